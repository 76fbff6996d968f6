"""Tests of each block against its paper's equations in plain NumPy."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ema_seg.attention import attention_names, build_attention
from ema_seg.attention.emau import dist
from ema_seg.runtime.errors import ModelError

BATCH, CHANNELS, HEIGHT, WIDTH = 3, 8, 5, 6


@pytest.fixture
def x():
    return torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def built(name, **options):
    """Build a block in double precision and training mode, with random parameters."""
    block = build_attention(name, CHANNELS, **options).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return block


def array(tensor):
    return tensor.detach().numpy()


def agrees(block, x, expected):
    assert_close(array(block(x)), expected, rtol=1e-9, atol=1e-9)


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def relu(values):
    return np.maximum(values, 0)


def softmax(values, axis):
    powers = np.exp(values - values.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def linear(vectors, layer):
    """Apply a 1×1 convolution to vectors (..., C), as a matrix product."""
    matrix = array(layer.weight).reshape(layer.weight.shape[:2])
    return vectors @ matrix.T + (0 if layer.bias is None else array(layer.bias))


def pointwise(maps, layer):
    """Apply a 1×1 convolution to maps (B, C, H, W)."""
    return np.moveaxis(linear(np.moveaxis(maps, 1, -1), layer), -1, 1)


def convolve(maps, layer, dilation=1, stride=1):
    """Convolve maps (B, C, H, W) by the definition, padded so that stride 1 keeps the size."""
    kernel = array(layer.weight)
    outputs, per_group, rows, columns = kernel.shape
    groups = maps.shape[1] // per_group
    up, left = dilation * (rows // 2), dilation * (columns // 2)
    padded = np.pad(maps, ((0, 0), (0, 0), (up, up), (left, left)))
    height, width = -(-maps.shape[2] // stride), -(-maps.shape[3] // stride)
    result = np.zeros((len(maps), outputs, height, width)) + (
        0 if layer.bias is None else array(layer.bias)[:, None, None]
    )
    for output in range(outputs):
        first = output // (outputs // groups) * per_group
        for i in range(height):
            for j in range(width):
                for k in range(rows):
                    for m in range(columns):
                        seen = padded[
                            :, first : first + per_group, i * stride + k * dilation, j * stride + m * dilation
                        ]
                        result[:, output, i, j] += seen @ kernel[output, :, k, m]
    return result


def standardise(values, axes, eps=1e-5):
    return (values - values.mean(axis=axes, keepdims=True)) / np.sqrt(values.var(axis=axes, keepdims=True) + eps)


def batch_norm(maps, layer):
    """Normalise by the statistics of the batch, as BatchNorm does in training mode."""
    scale, shift = (array(parameter)[:, None, None] for parameter in (layer.weight, layer.bias))
    return scale * standardise(maps, (0, 2, 3)) + shift


def per_pixel(vectors):
    """Reshape vectors (B, C) to maps of one pixel."""
    return vectors[:, :, None, None]


def test_se(x):
    block = built("se", reduction=4)

    gate = sigmoid(linear(relu(linear(array(x).mean((2, 3)), block.fc1)), block.fc2))

    assert block.fc1.out_channels == 2
    agrees(block, x, array(x) * per_pixel(gate))


def test_ese_has_one_layer(x):
    block = built("ese")
    answer = linear(array(x).mean((2, 3)), block.fc)

    agrees(block, x, array(x) * per_pixel(sigmoid(answer)))
    agrees(built("ese", gate="hard_sigmoid"), x, array(x) * per_pixel(np.clip(answer / 6 + 0.5, 0, 1)))


@pytest.mark.parametrize("parts", ["both", "channel", "spatial"])
def test_scse_adds_a_channel_gated_and_a_pixel_gated_copy(x, parts):
    block = built("scse", parts=parts)
    expected = 0
    if parts != "spatial":
        _, first, _, second, _ = block.cSE
        expected += array(x) * per_pixel(sigmoid(linear(relu(linear(array(x).mean((2, 3)), first)), second)))
    if parts != "channel":
        expected += array(x) * sigmoid(pointwise(array(x), block.sSE[0]))

    agrees(block, x, expected)


def test_eca_convolves_the_means_along_the_channels(x):
    block = built("eca", kernel_size=5)
    kernel = array(block.conv.weight).ravel()

    padded = np.pad(array(x).mean((2, 3)), ((0, 0), (2, 2)))
    gate = sigmoid(np.stack([padded[:, channel : channel + 5] @ kernel for channel in range(CHANNELS)], axis=1))

    agrees(block, x, array(x) * per_pixel(gate))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 8, 16, 24, 64, 100, 127, 128, 256, 512, 1024, 2048])
def test_ecas_kernel_size_is_the_odd_number_nearest_to_the_papers_formula(channels):
    sought = (np.log2(channels) + 1) / 2
    nearest = min(range(1, 15, 2), key=lambda size: (abs(size - sought), -size))

    assert build_attention("eca", channels).conv.kernel_size == (nearest,)


@pytest.mark.parametrize("parts", ["both", "channel", "spatial"])
@pytest.mark.parametrize("batch_norm_too", [False, True])
def test_cbam_gates_channels_and_then_pixels(x, parts, batch_norm_too):
    block = built("cbam", reduction=2, kernel_size=3, parts=parts, batch_norm=batch_norm_too)
    expected = array(x)
    if parts != "spatial":
        first, _, second = block.channel.mlp
        answers = [
            linear(relu(linear(pooled, first)), second) for pooled in (expected.mean((2, 3)), expected.max((2, 3)))
        ]
        expected = expected * per_pixel(sigmoid(sum(answers)))
    if parts != "channel":
        convolved = convolve(np.stack([expected.mean(1), expected.max(1)], axis=1), block.spatial.conv)
        expected = expected * sigmoid(batch_norm(convolved, block.spatial.norm) if batch_norm_too else convolved)

    agrees(block, x, expected)


@pytest.mark.parametrize("parts", ["both", "channel", "spatial"])
def test_bam_adds_both_maps_before_the_sigmoid(x, parts):
    block = built("bam", reduction=4, dilation=2, parts=parts)
    attention = 0
    if parts != "spatial":
        first, _, second, norm = block.channel
        attention += batch_norm(per_pixel(linear(relu(linear(array(x).mean((2, 3)), first)), second)), norm)
    if parts != "channel":
        reduce, _, dilated, _, dilated_again, _, last, norm = block.spatial
        hidden = relu(pointwise(array(x), reduce))
        hidden = relu(convolve(hidden, dilated, dilation=2))
        hidden = relu(convolve(hidden, dilated_again, dilation=2))
        attention = attention + batch_norm(pointwise(hidden, last), norm)

    agrees(block, x, array(x) + array(x) * sigmoid(attention))


@pytest.mark.parametrize("name", ["bam", "srm"])
def test_a_batch_of_one_image_is_refused_in_training_where_a_batch_is_normalised(name, x):
    with pytest.raises(ModelError, match=r"at least 2 images per batch in training.*raise data\.batch_size"):
        built(name)(x[:1])
    built(name).eval()(x[:1])
    build_attention("bam", CHANNELS, parts="spatial").double()(x[:1])


def test_coordinate_attention_sees_rows_and_columns_through_one_bottleneck(x):
    block = built("coord")
    rows, columns = array(x).mean(3), array(x).mean(2)

    hidden = linear(np.concatenate([rows, columns], axis=2).swapaxes(1, 2), block.conv1).swapaxes(1, 2)
    hidden = batch_norm(hidden[..., None], block.bn1)[..., 0]
    hidden = hidden * np.clip(hidden + 3, 0, 6) / 6
    row_gate = sigmoid(pointwise(hidden[:, :, :HEIGHT, None], block.conv_h))
    column_gate = sigmoid(pointwise(hidden[:, :, None, HEIGHT:], block.conv_w))

    assert block.conv1.out_channels == 8
    agrees(block, x, array(x) * row_gate * column_gate)


@pytest.mark.parametrize(
    ("variant", "kernel_size", "per_group"), [("tiny", 5, 1), ("base", 7, 1), ("small", 5, 8), ("large", 7, 8)]
)
def test_ela_convolves_and_normalises_rows_and_columns_with_shared_weights(x, variant, kernel_size, per_group):
    block = built("ela", variant=variant)
    scale, shift = array(block.gn.weight)[:, None], array(block.gn.bias)[:, None]

    def gates(means):
        half = kernel_size // 2
        padded = np.pad(means, ((0, 0), (0, 0), (half, half)))
        convolved = np.zeros_like(means)
        for channel, kernel in enumerate(array(block.conv.weight)):
            first = channel // per_group * per_group
            for place in range(means.shape[2]):
                seen = padded[:, first : first + per_group, place : place + kernel_size]
                convolved[:, channel, place] = (seen * kernel).sum((1, 2))
        # GroupNorm with one group per channel: the largest divisor of 8 up to 16 is 8.
        return sigmoid(scale * standardise(convolved, 2) + shift)

    expected = array(x) * gates(array(x).mean(3))[:, :, :, None] * gates(array(x).mean(2))[:, :, None, :]

    assert block.conv.weight.shape == (CHANNELS, per_group, kernel_size)
    agrees(block, x, expected)


@pytest.mark.parametrize(
    ("variant", "channels", "groups"), [("tiny", 64, 32), ("base", 64, 16), ("base", 24, 12), ("large", 12, 12)]
)
def test_ela_takes_the_largest_divisor_where_a_number_does_not_divide_the_channels(variant, channels, groups):
    block = build_attention("ela", channels, variant=variant)

    assert block.gn.num_groups == groups
    if variant == "large":
        assert block.conv.groups == 2  # 6 channels per group, the largest divisor of 12 up to 8


def test_strip_pooling_gates_by_the_row_and_the_column(x):
    block = built("strip")
    rows = batch_norm(convolve(array(x).mean(3, keepdims=True), block.conv1), block.bn1)
    columns = batch_norm(convolve(array(x).mean(2, keepdims=True), block.conv2), block.bn2)

    fused = np.empty(x.shape)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            fused[:, :, row, column] = rows[:, :, row, 0] + columns[:, :, 0, column]

    agrees(block, x, array(x) * sigmoid(pointwise(relu(fused), block.conv3)))


def nearest(maps):
    """Resize maps (B, C, h, w) to the size of the input by the nearest neighbour."""
    rows = np.arange(HEIGHT) * maps.shape[2] // HEIGHT
    columns = np.arange(WIDTH) * maps.shape[3] // WIDTH
    return maps[:, :, rows][:, :, :, columns]


def test_gather_excite_without_parameters(x):
    around = np.empty((BATCH, CHANNELS, 3, 3))
    for row in range(3):
        for column in range(3):
            # The 3×3 window around every second pixel, cropped at the border.
            window = array(x)[:, :, max(0, 2 * row - 1) : 2 * row + 2, max(0, 2 * column - 1) : 2 * column + 2]
            around[:, :, row, column] = window.mean((2, 3))

    agrees(built("ge"), x, array(x) * sigmoid(per_pixel(array(x).mean((2, 3)))))
    agrees(built("ge", extent=2), x, array(x) * sigmoid(nearest(around)))


@pytest.mark.parametrize("variant", ["theta", "theta_plus"])
def test_gather_excite_with_parameters(x, variant):
    block = built("ge", variant=variant, extent=4, reduction=4)
    first, first_norm, _, second, second_norm = block.gather

    gathered = relu(batch_norm(convolve(array(x), first, stride=2), first_norm))
    gathered = batch_norm(convolve(gathered, second, stride=2), second_norm)
    if variant == "theta_plus":
        _, down, _, up = block.excite
        gathered = pointwise(relu(pointwise(relu(gathered), down)), up)

    assert gathered.shape[2:] == (2, 2)
    agrees(block, x, array(x) * sigmoid(nearest(gathered)))


@pytest.mark.parametrize("pooling", ["attention", "average"])
@pytest.mark.parametrize("fusion", ["add", "scale"])
def test_gc_adds_a_bottleneck_of_the_attended_pixels(x, pooling, fusion):
    block = built("gc", reduction=2, pooling=pooling, fusion=fusion)
    mlp = block.mlp_add if fusion == "add" else block.mlp_scale
    pixels = array(x).reshape(BATCH, CHANNELS, -1)
    if pooling == "attention":
        weights = softmax(pointwise(array(x), block.conv_attn).reshape(BATCH, 1, -1), axis=2)
        context = (pixels * weights).sum(2)
    else:
        context = pixels.mean(2)

    hidden = linear(context, mlp.fc1)
    hidden = standardise(hidden, 1, mlp.norm.eps) * array(mlp.norm.weight) + array(mlp.norm.bias)
    answer = per_pixel(linear(relu(hidden), mlp.fc2))

    agrees(block, x, array(x) + answer if fusion == "add" else array(x) * sigmoid(answer))


def test_gc_starts_as_the_identity(x):
    agrees(build_attention("gc", CHANNELS).double(), x, array(x))


def test_simam_gates_by_the_inverse_of_the_energy(x):
    target, others = array(x), HEIGHT * WIDTH - 1
    mean = target.mean((2, 3), keepdims=True)
    variance = ((target - mean) ** 2).sum((2, 3), keepdims=True) / others
    # The minimal energy of a neuron, equation 5 of the paper.
    energy = 4 * (variance + 1e-4) / ((target - mean) ** 2 + 2 * variance + 2 * 1e-4)

    agrees(build_attention("simam", CHANNELS), x, target * sigmoid(1 / energy))


def test_shuffle_attention_gates_half_a_group_by_means_and_half_by_normalised_values(x):
    block = built("shuffle", groups=2)
    cweight, cbias, sweight, sbias = (
        array(getattr(block, name)).ravel() for name in ("cweight", "cbias", "sweight", "sbias")
    )
    gated = np.empty(x.shape)
    for group in range(2):
        for place in range(2):
            channel, partner = 4 * group + place, 4 * group + 2 + place
            means = array(x)[:, channel].mean((1, 2), keepdims=True)
            gated[:, channel] = array(x)[:, channel] * sigmoid(cweight[place] * means + cbias[place])
            normal = standardise(array(x)[:, partner], (1, 2))
            normal = array(block.gn.weight)[place] * normal + array(block.gn.bias)[place]
            gated[:, partner] = array(x)[:, partner] * sigmoid(sweight[place] * normal + sbias[place])

    agrees(block, x, gated[:, [0, 4, 1, 5, 2, 6, 3, 7]])


def test_shuffle_attention_has_the_papers_number_of_groups_where_the_channels_permit():
    assert [build_attention("shuffle", channels).groups for channels in (256, 128, 64, 24, 2)] == [64, 64, 32, 12, 1]


@pytest.mark.parametrize("parts", ["both", "channel", "spatial"])
def test_triplet_attention_averages_the_copies_of_three_rotations(x, parts):
    block = built("triplet", kernel_size=3, parts=parts)

    def attend(maps, gate):
        """Gate maps (B, K, ·, ·) by a convolution of their maximum and mean over K."""
        convolved = convolve(np.stack([maps.max(1), maps.mean(1)], axis=1), gate[0])
        return maps * sigmoid(batch_norm(convolved, gate[1]))

    copies = []
    if parts != "spatial":
        copies.append(attend(array(x).transpose(0, 2, 1, 3), block.cw).transpose(0, 2, 1, 3))
        copies.append(attend(array(x).transpose(0, 3, 2, 1), block.hc).transpose(0, 3, 2, 1))
    if parts != "channel":
        copies.append(attend(array(x), block.hw))

    agrees(block, x, sum(copies) / len(copies))


def test_nam_weighs_each_normalised_channel_by_its_share_of_the_scales(x):
    block = built("nam")
    scale = abs(array(block.bn.weight))

    gate = sigmoid((scale / scale.sum())[:, None, None] * batch_norm(array(x), block.bn))

    agrees(block, x, array(x) * gate)


@pytest.mark.parametrize("parts", ["both", "channel", "spatial"])
def test_gam_gates_channels_and_then_pixels_without_pooling(x, parts):
    block = built("gam", parts=parts)
    expected = array(x)
    if parts != "spatial":
        first, _, second, _ = block.channel
        answer = linear(relu(linear(expected.transpose(0, 2, 3, 1), first)), second)
        expected = expected * sigmoid(answer.transpose(0, 3, 1, 2))
    if parts != "channel":
        first, first_norm, _, second, second_norm, _ = block.spatial
        hidden = relu(batch_norm(convolve(expected, first), first_norm))
        expected = expected * sigmoid(batch_norm(convolve(hidden, second), second_norm))

    agrees(block, x, expected)


def test_srm_gates_by_mean_and_standard_deviation(x):
    block = built("srm")
    weights = array(block.cfc)

    style = weights[:, 0] * array(x).mean((2, 3)) + weights[:, 1] * np.sqrt(array(x).var((2, 3)) + 1e-5)

    agrees(block, x, array(x) * sigmoid(batch_norm(per_pixel(style), block.bn)))


def test_emau_reconstructs_each_image_from_bases_of_its_own(x):
    block = built("emau", bases=4, iterations=2, momentum=0.7)
    start = array(block.mu)[0].copy()
    pixels = pointwise(array(x), block.conv1).reshape(BATCH, CHANNELS, -1)

    reconstruction, ends = np.empty_like(pixels), []
    for image in range(BATCH):
        bases = start
        for _ in range(2):
            responsibilities = softmax(pixels[image].T @ bases, axis=1)  # one row per pixel
            bases = pixels[image] @ (responsibilities / responsibilities.sum(0))
            bases = bases / np.linalg.norm(bases, axis=0)
        reconstruction[image] = bases @ responsibilities.T
        ends.append(bases)
    answer = batch_norm(pointwise(relu(reconstruction.reshape(x.shape)), block.conv2[0]), block.conv2[1])

    # The published code adds 1e-6 to its denominators, which the equations here leave out.
    assert_close(array(block(x)), relu(answer + array(x)), rtol=1e-4, atol=1e-4)
    assert_close(array(block.mu)[0], 0.7 * start + 0.3 * np.mean(ends, axis=0), rtol=1e-5, atol=1e-5)


def test_the_bases_of_emau_follow_in_training_only_and_without_a_gradient(x):
    block = built("emau").eval()
    before = block.mu.clone()
    block(x)
    assert torch.equal(block.mu, before)

    block.train()(x).sum().backward()
    assert not torch.equal(block.mu, before)
    assert not block.mu.requires_grad
    assert [name for name, parameter in block.named_parameters() if not parameter.requires_grad] == [
        "conv1.weight",
        "conv1.bias",
    ]


def test_the_bases_of_emau_are_the_same_on_every_process(x, monkeypatch):
    blocks = [built("emau", momentum=0.5) for _ in range(2)]
    start = torch.randn_like(blocks[0].mu)
    alone = []
    for block, images in zip(blocks, (x[:1], x[1:]), strict=True):
        block.mu = start.clone()
        block(images)
        alone.append(2 * block.mu - start)  # the new bases: mu is the mean of start and new bases
        block.mu = start.clone()

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.copy_(alone[0] + alone[1]))
    for block, images in zip(blocks, (x[:1], x[1:]), strict=True):
        block(images)

    assert torch.equal(blocks[0].mu, blocks[1].mu)
    assert_close(blocks[0].mu, (start + (alone[0] + alone[1]) / 2) / 2)


def test_ema_with_nothing_taken_away_is_the_published_block(x):
    torch.manual_seed(0)
    whole = build_attention("ema", CHANNELS, factor=2, implementation="reference").double()
    torch.manual_seed(0)
    block = build_attention("ema_ablated", CHANNELS, factor=2).double()

    for name, parameter in whole.state_dict().items():
        assert torch.equal(block.state_dict()[name], parameter), name
    assert torch.equal(block(x), whole(x))


@pytest.mark.parametrize(
    ("branches", "normalised"),
    [("both", True), ("both", False), ("pointwise", True), ("pointwise", False), ("spatial", True)],
)
def test_ema_with_parts_taken_away(x, branches, normalised):
    block = built("ema_ablated", branches=branches, normalisation=normalised, factor=2)
    groups = array(x).reshape(2 * BATCH, 4, HEIGHT, WIDTH)
    names = set()

    def crossed(descriptor, features):
        return np.einsum("nc,nchw->nhw", softmax(descriptor.mean((2, 3)), 1), features)

    if branches != "spatial":
        row_gate = sigmoid(pointwise(groups.mean(3, keepdims=True), block.conv1x1))
        column_gate = sigmoid(pointwise(groups.mean(2, keepdims=True), block.conv1x1))
        x1 = groups * row_gate * column_gate
        names |= {"conv1x1.weight", "conv1x1.bias"}
        if normalised:
            scale, shift = (array(parameter)[:, None, None] for parameter in (block.gn.weight, block.gn.bias))
            x1 = scale * standardise(x1, (2, 3)) + shift
            names |= {"gn.weight", "gn.bias"}
    if branches != "pointwise":
        x2 = convolve(groups, block.conv3x3)
        names |= {"conv3x3.weight", "conv3x3.bias"}
    if branches == "both":
        weights = crossed(x1, x2) + crossed(x2, x1)
    else:
        alone = x1 if branches == "pointwise" else x2
        weights = crossed(alone, alone)

    assert set(block.state_dict()) == names
    agrees(block, x, (groups * sigmoid(weights)[:, None]).reshape(x.shape))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ema_ablated", {"branches": "none"}, "branches must be one of both, pointwise, spatial, got 'none'"),
        ("ema_ablated", {"branches": "spatial", "normalisation": False}, "set normalisation=True"),
        ("ema_ablated", {"factor": 3}, "cannot split 8 channels into factor=3"),
        ("ese", {"gate": "tanh"}, "gate must be one of sigmoid, hard_sigmoid, got 'tanh'"),
        ("scse", {"parts": "half"}, "parts must be one of both, channel, spatial, got 'half'"),
        ("eca", {"kernel_size": 4}, "kernel_size must be an odd whole number .*, got 4"),
        ("eca", {"kernel_size": "big"}, "kernel_size must be an odd whole number .*, got 'big'"),
        ("cbam", {"reduction": 0}, "reduction must be a whole number of at least 1, got 0"),
        ("cbam", {"batch_norm": "yes"}, "batch_norm must be one of False, True, got 'yes'"),
        ("bam", {"dilation": 1.5}, "dilation must be a whole number .*, got 1.5"),
        ("coord", {"reduction": -1}, "reduction must be .*, got -1"),
        ("ela", {"variant": "huge"}, "must be one of tiny, base, small, large, got 'huge'"),
        ("ge", {"extent": 3}, "extent must be a power of two above 1, or 'global', got 3"),
        ("ge", {"variant": "theta"}, "variant='theta' needs a fixed extent, .* choose an extent such as 2"),
        ("gc", {"fusion": "mean"}, "fusion must be one of add, scale, got 'mean'"),
        ("simam", {"e_lambda": 0}, "e_lambda must be a number above 0, .*, got 0"),
        ("shuffle", {"groups": 3}, "groups must be a divisor of 4, .*, got 3"),
        ("triplet", {"kernel_size": True}, "kernel_size must be an odd .*, got True"),
        ("gam", {"parts": None}, "parts must be one of .*, got None"),
        ("emau", {"momentum": 2}, "momentum must be a number from 0 to 1, got 2"),
        ("emau", {"bases": 0}, "bases must be .*, got 0"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(name, options, said):
    with pytest.raises(ModelError, match=said):
        build_attention(name, CHANNELS, **options)


@pytest.mark.parametrize("name", sorted({*attention_names()} - {"none", "ema", "ema_dynamic"}))
def test_channels_are_a_positive_whole_number(name):
    with pytest.raises(ModelError, match=r"channels.*\b0\b|\b0 channels"):
        build_attention(name, 0)

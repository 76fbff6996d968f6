import inspect
import re
from copy import deepcopy

import pytest
import torch
import yaml
from torch import nn
from torch.testing import assert_close

from ema_seg.attention import attention_names, build_attention
from ema_seg.models import build_segmenter, placement
from ema_seg.models.placement import PLACEMENTS, place_attention
from ema_seg.runtime.errors import ConfigError, ModelError
from tests.conftest import ROOT


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def config_of(name):
    """Read the text of a block's configuration file."""
    return (ROOT / "configs" / "attention" / f"{name}.yaml").read_text(encoding="utf-8")


def options_of(name):
    """Read the options of a block from its configuration file."""
    options = yaml.safe_load(config_of(name))
    assert options.pop("name") == name
    return options


def value_and_gradient(block, x):
    x = x.detach().requires_grad_()
    y = block(x)
    # The square: the gradient of a plain sum of softmax or normalised values is zero up to rounding.
    y.square().sum().backward()
    return y.detach(), x.grad


# Every block with the options of its configuration file, and some blocks with other options.
BLOCKS = [
    *((name, options_of(name)) for name in attention_names()),
    *(("ema_ablated", {"branches": branches}) for branches in ("pointwise", "spatial")),
    *(("ema_ablated", {"branches": branches, "normalisation": False}) for branches in ("both", "pointwise")),
    ("ese", {"gate": "hard_sigmoid"}),
    *((name, {"parts": part}) for name in ("scse", "cbam", "bam", "triplet", "gam") for part in ("channel", "spatial")),
    ("cbam", {"batch_norm": True}),
    *(("ela", {"variant": variant}) for variant in ("tiny", "small", "large")),
    ("ge", {"extent": 4}),
    *(("ge", {"variant": variant, "extent": 4}) for variant in ("theta", "theta_plus")),
    ("gc", {"pooling": "average"}),
    ("gc", {"fusion": "scale"}),
]


every_block = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            name, options, id="-".join([name, *(str(options[key]) for key in options if options != options_of(name))])
        )
        for name, options in BLOCKS
    ],
)


every_configuration = pytest.mark.parametrize("name", [name for name in attention_names() if name != "none"])


@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_keeps_shape_and_dtype_and_trains(name, options, dtype):
    block = build_attention(name, 64, **options).to(dtype)
    x = torch.randn(2, 64, 6, 9, dtype=dtype, requires_grad=True)

    y = block(x)
    y.square().mean().backward()

    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    for parameter_name, parameter in block.named_parameters():
        # EMAU's first convolution is frozen, as published.
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
        assert parameter.requires_grad or name == "emau"


@every_block
def test_the_weight_map_is_what_the_block_multiplies_by(name, options):
    block = randomised(build_attention(name, 16, **options)).eval()
    x = torch.randn(2, 16, 6, 9)

    with torch.no_grad():
        y = block(x)
        if not hasattr(block, "weight_map"):
            assert name in ("none", "emau", "gc")  # they multiply by nothing
            return
        weights = block.weight_map(x)
        product = (x.unflatten(1, (weights.shape[1], -1)) * weights.unsqueeze(2)).flatten(1, 2)

    assert weights.shape[0] in (1, len(x))
    assert all(size in (1, whole) for size, whole in zip(weights.shape[2:], x.shape[2:], strict=True))
    assert_close(y, block.shuffle(product) if name == "shuffle" else product)


@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_dtype_and_every_gradient(name, options, dtype):
    block = build_attention(name, 16, **options)
    x = torch.randn(2, 16, 5, 7, dtype=dtype, requires_grad=True)

    with torch.autocast("cpu", torch.bfloat16):
        # Twice, because autocast caches its casts of the weights.
        y = block(block(x))
    y.square().mean().backward()

    assert y.dtype == dtype
    for parameter_name, parameter in block.named_parameters():
        assert not parameter.requires_grad or torch.isfinite(parameter.grad).all(), parameter_name


@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_memory_layout_changes_no_number(name, options, dtype, training):
    block = randomised(build_attention(name, 16, **options)).to(dtype).train(training)
    twin = deepcopy(block)
    x = torch.randn(2, 16, 5, 7).to(dtype)

    expected, expected_gradient = value_and_gradient(block, x)
    actual, gradient = value_and_gradient(twin, x.contiguous(memory_format=torch.channels_last))

    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    assert_close(actual, expected, **close)
    scale = expected_gradient.abs().max()
    assert_close(gradient / scale, expected_gradient / scale, **close)


@every_block
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 24])
def test_few_channels_and_single_pixels_work_or_are_refused_in_a_sentence(name, options, channels):
    try:
        block = build_attention(name, channels, **options).eval()
    except ModelError as error:
        assert str(channels) in str(error)
        assert (name, channels) in {("scse", 1), ("shuffle", 1), ("shuffle", 3)}
        return
    for size in ((1, 1), (1, 4), (3, 1)):
        x = torch.randn(1, channels, *size)
        y = block(x)
        assert y.shape == x.shape
        assert torch.isfinite(y).all()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return build_segmenter("unet", classes=3, encoder="tu-test_efficientnet")


# A placement builds the same modules whatever the block, so one block is enough for each placement alone.
PLACED = [
    *((name, PLACEMENTS) for name in attention_names() if name != "none"),
    *(("ema", (placement,)) for placement in PLACEMENTS),
]


@pytest.mark.parametrize(("name", "placements"), PLACED)
def test_every_block_trains_at_every_placement(unet, name, placements, monkeypatch):
    # The image that probes the model must suit every decoder; for this one a small image is enough, and faster.
    monkeypatch.setattr(placement, "_small_image", lambda _: torch.zeros(1, 3, 64, 64))
    model = deepcopy(unet)
    built = []

    def build_block(channels, path):
        built.append(build_attention(name, channels, **options_of(name)))
        return built[-1]

    place_attention(model, "unet", build_block, placements)
    logits = model(torch.randn(2, 3, 64, 32))
    logits.square().mean().backward()

    assert logits.shape == (2, 3, 64, 32)
    assert len(built) == sum({"encoder": 5, "decoder": 5, "head": 1}[place] for place in placements)
    for block in built:
        for parameter_name, parameter in block.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


# Compilation and export take as long as all other tests of a block, and its options use the same operators.
@pytest.mark.slow
@every_configuration
def test_a_compiled_block_is_the_block(name):
    torch.compiler.reset()
    block = randomised(build_attention(name, 16, **options_of(name)))
    twin = deepcopy(block)
    x = torch.randn(2, 16, 5, 7)

    expected, expected_gradient = value_and_gradient(block, x)
    # aot_eager runs the whole compiler except code generation, which takes seconds.
    actual, gradient = value_and_gradient(torch.compile(twin, backend="aot_eager", fullgraph=True), x)

    assert_close(actual, expected)
    assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert_close(twin.state_dict(), block.state_dict())


@pytest.mark.slow
def test_compiled_code_is_the_block():
    torch.compiler.reset()
    block = nn.Sequential(*(randomised(build_attention(name, 8)) for name in ("cbam", "shuffle")))
    twin = deepcopy(block)
    x = torch.randn(2, 8, 5, 7)

    assert_close(torch.compile(twin, fullgraph=True)(x), block(x))
    assert_close(twin.state_dict(), block.state_dict())


@pytest.mark.slow
@torch.no_grad()
def test_exported_blocks_are_the_blocks_on_maps_of_any_size(tmp_path):
    import onnxruntime

    names = [name for name in attention_names() if name != "none"]
    blocks = {name: randomised(build_attention(name, 16, **options_of(name))).eval() for name in names}

    class SideBySide(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleDict({f"_{name}": block for name, block in blocks.items()})

        def forward(self, x):
            return [block(x) for block in self.blocks.values()]

    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=5), 3: torch.export.Dim("width", min=5)}
    program = torch.export.export(SideBySide(), (torch.randn(2, 16, 5, 7),), dynamic_shapes=(free,), strict=False)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "blocks.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "blocks.onnx", providers=["CPUExecutionProvider"])

    for shape in ((1, 16, 5, 7), (3, 16, 12, 6)):
        x = torch.randn(shape)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for name, own, other in zip(names, program.module()(x), found, strict=True):
            expected = blocks[name](x)
            assert_close(own, expected, msg=lambda text, name=name: f"{name}: {text}")
            assert_close(
                torch.from_numpy(other), expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@every_configuration
def test_the_configuration_has_the_link_and_the_defaults_and_the_documentation_has_the_block(name):
    options = options_of(name)
    defaults = {
        option: parameter.default
        for option, parameter in inspect.signature(type(build_attention(name, 32, **options))).parameters.items()
        if option not in ("channels", "c2")
    }

    # EMA's published default of 32 groups does not divide the channels of every decoder.
    assert options == (defaults | {"factor": "auto"} if "factor" in defaults else defaults)
    assert re.search(r"https://\S+|docs/ema.md", config_of(name))
    assert re.search(rf"^\| `{name}` \|.*https://", (ROOT / "docs" / "attention.md").read_text(), re.MULTILINE)


def test_none_is_the_identity():
    x = torch.randn(1, 3, 4, 5)

    assert build_attention("none", 3)(x) is x


def test_unknown_names_and_options_are_named_with_what_there_is():
    with pytest.raises(ConfigError, match=r"'emma'.*Did you mean 'ema'"):
        build_attention("emma", 8)
    with pytest.raises(ConfigError, match=r"attention\.factr: .*it has factor"):
        build_attention("ema", 8, factr=2)
    with pytest.raises(ConfigError, match=r"attention\.factor: .*'none' has no such option; it has none"):
        build_attention("none", 8, factor=2)
    with pytest.raises(ModelError, match=r"reduction must be a whole number from 1 to .* \(4\), got 8"):
        build_attention("scse", 4, reduction=8)

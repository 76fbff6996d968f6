# mypy: disallow-untyped-defs=False, disable-error-code="assignment,misc"
"""Triton kernels of EMA's short form; ``triton_plan`` divides the work, ``triton_launch`` launches them.

The arithmetic and the names are those of ``factorised``. The work is divided into phases. Each phase needs sums over
whole groups of channels from the phase before it:

- forward: means of rows and columns; gates; moments of the gated channels; mixing coefficients; weights and output;
- backward: gates and mixing coefficients again; gradient of the weights' logit and sums of its products with the
  channels; gradients of the mixing coefficients, means and parameters; gradient of the input. A second kernel sums the
  parameters' gradients over the groups.

Each phase is a function for some channels and a region (some rows of some columns) of a block of groups. If the blocks
are small, the phases are fused: one program takes a block through all of them in a single launch, with barriers in
between. Otherwise each phase is a launch of its own over smaller regions, with partial sums in scratch memory, and the
next phase starts with the regions that this one has visited last, which are still in the cache. For a given tile size
all sums have a fixed order, so results repeat exactly.

The arithmetic is float64 for float64 inputs, else float32. The products of small matrices are sums of products, never
``tl.dot``, which may round float32 to tf32.

In the kernels n counts the B · G groups of a batch and ``channel`` its B · C channels; c and o are channels of one
group. A tile [K, ROWS, COLUMNS] holds K = tile_groups · tile_channels channels of ROWS by COLUMNS pixels. A
channels-last input has the K channels consecutive in memory, a contiguous one the columns.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # not every platform has it
    triton = None

__all__ = [
    "INTERPRETED",
    "PLANES_OF_BACKWARD",
    "PLANES_OF_FORWARD",
    "backward_kernel",
    "empty_kernel",
    "forward_kernel",
    "parameters_kernel",
    "triton",
]

INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def _kernel(function: Any) -> Any:
    """Apply ``triton.jit`` to a kernel, without recompiling it for sizes of 1 or multiples of 16."""
    if triton is None:
        return function
    sizes = ["height", "width", "width_in_units", "first", "parts", "spans", "family", "number", "position_parts"]
    return triton.jit(function, do_not_specialize=sizes)


def _jit(function: Any) -> Any:
    """Apply ``triton.jit`` to a device function, except in the interpreter, which is faster without it."""
    return function if triton is None or INTERPRETED else triton.jit(function)


def _constant(value: int) -> Any:
    return value if triton is None else tl.constexpr(value)


# Planes of the mixing coefficients: tensors with one number for each channel of the batch.
_KERNEL = _constant(0)  # 3×3 kernel to a single channel: a plane for each of 9 taps
_KAPPA = _constant(9)  # weight of the centred gated channel
_LOGIT = _constant(10)  # constant of the logit, at the first channel of each group
PLANES_OF_FORWARD = 11
_SHIFTED = _constant(11)  # sum of x over the window of each tap: 9 planes
_DSHIFTED = _constant(20)
_DKERNEL = _constant(29)
_A1 = _constant(38)
_A2 = _constant(39)
_DM2 = _constant(40)  # gradient of the means of the 3×3 branch
_ALPHA = _constant(41)  # the gated map's gradient is kappa · dlogit + alpha · centred + offset
_OFFSET = _constant(42)
PLANES_OF_BACKWARD = 43


# ------------------------------------------------------------------------------------------- indexing and memory access
# ``block`` is (image, first group) of this program, ``region`` (part, span, first row, row after the last, first
# column, column after the last), ``shape`` (height, width, channels of the batch) and ``grid`` (parts, spans): the
# numbers of regions from top to bottom and from left to right.


@_jit
def _block(first, reverse: tl.constexpr, plan: tl.constexpr):
    blocks = (plan.groups + plan.tile_groups - 1) // plan.tile_groups
    program = first + (tl.num_programs(0) - 1 - tl.program_id(0) if reverse else tl.program_id(0))
    return (program // blocks).to(tl.int64), program % blocks * plan.tile_groups


@_jit
def _rows_per_part(height, grid):
    parts = grid[0]
    return (height + parts - 1) // parts


@_jit
def _columns_per_span(width, grid, plan: tl.constexpr):
    spans = grid[1]
    tiles = (width + plan.tile_columns - 1) // plan.tile_columns
    return (tiles + spans - 1) // spans * plan.tile_columns


@_jit
def _region(shape, grid, reverse: tl.constexpr, plan: tl.constexpr):
    height, width = shape[0], shape[1]
    spans = grid[1]
    program = tl.num_programs(1) - 1 - tl.program_id(1) if reverse else tl.program_id(1)
    part, span = program // spans, program % spans
    rows, columns = _rows_per_part(height, grid), _columns_per_span(width, grid, plan)
    last_row, last_column = tl.minimum((part + 1) * rows, height), tl.minimum((span + 1) * columns, width)
    return part, span, part * rows, last_row, span * columns, last_column


@_jit
def _chunk(plan: tl.constexpr):
    """Return the range of channels c of this program: all, or one tile's if the grid has a third axis."""
    tiles = (plan.width + plan.tile_channels - 1) // plan.tile_channels
    channels = (tiles + tl.num_programs(2) - 1) // tl.num_programs(2) * plan.tile_channels
    first = tl.program_id(2) * channels
    return first, tl.minimum(first + channels, plan.width)


@_jit
def _channels(block, c0, shape, plan: tl.constexpr):
    """Return indices, offsets in x and validity of the K channels of a tile that starts at channel c0."""
    image, group = block
    height, width = shape[0], shape[1]
    k = tl.arange(0, plan.tile_groups * plan.tile_channels)
    g = group + k // plan.tile_channels
    c = c0 + k % plan.tile_channels
    valid = (g < plan.groups) & (c < plan.width)
    in_image = g * plan.width + c
    if plan.tile_channels == plan.width:
        in_image = group * plan.width + k  # the same, but shows the compiler that all K are consecutive
    first_of_image = image * (plan.groups * plan.width)
    area = tl.cast(height, tl.int64) * width
    if plan.last:
        return first_of_image + in_image, first_of_image * area + in_image, valid
    return first_of_image + in_image, (first_of_image + in_image) * area, valid


@_jit
def _pixels(rows, columns, shape, plan: tl.constexpr):
    """Return the offsets of pixels [ROWS, COLUMNS] from their channel's first pixel."""
    width = shape[1]
    pixels = rows.to(tl.int64)[:, None] * width + columns[None, :]
    if plan.last:
        pixels = pixels * (plan.groups * plan.width)
    return pixels


@_jit
def _load_tile(x, base, valid, rows, columns, last_row, shape, plan: tl.constexpr, acc: tl.constexpr):
    """Load a tile of x, [K, ROWS, COLUMNS]; 0 outside the image and from ``last_row`` on."""
    width = shape[1]
    inside = ((rows >= 0) & (rows < last_row))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    pointers = x + (base[:, None, None] + _pixels(rows, columns, shape, plan)[None, :, :])
    return tl.load(pointers, mask=valid[:, None, None] & inside[None, :, :], other=0.0).to(acc)


@_jit
def _load_column(x, base, valid, rows, column, shape, plan: tl.constexpr, acc: tl.constexpr):
    """Load one column of x, [K, ROWS, 1]; 0 outside the image."""
    height, width = shape[0], shape[1]
    inside = (rows >= 0) & (rows < height) & (column >= 0) & (column < width)
    pixels = rows.to(tl.int64) * width + column
    if plan.last:
        pixels = pixels * (plan.groups * plan.width)
    mask = valid[:, None] & inside[None, :]
    return tl.load(x + (base[:, None] + pixels[None, :]), mask=mask, other=0.0).to(acc)[:, :, None]


@_jit
def _load_axes(axes, channel, valid, rows, columns, shape):
    """Load values of rows [K, ROWS, 1] and columns [K, 1, COLUMNS] from a tensor (B · C, H + W)."""
    height, width = shape[0], shape[1]
    start = axes + channel[:, None] * (height + width)
    of_rows = tl.load(start + rows[None, :], mask=valid[:, None] & (rows < height)[None, :], other=0.0)
    column_mask = valid[:, None] & (columns < width)[None, :]
    of_columns = tl.load(start + height + columns[None, :], mask=column_mask, other=0.0)
    return of_rows[:, :, None], of_columns[:, None, :]


@_jit
def _load_plane(planes, plane, channel, valid, shape):
    """Load one coefficient per channel, as [K, 1, 1]."""
    count = shape[2]
    return tl.load(planes + plane * count + channel, mask=valid, other=0.0)[:, None, None]


@_jit
def _map_pointers(maps, block, rows, columns, shape, plan: tl.constexpr):
    """Return pointers to [groups, ROWS, COLUMNS] of a tensor (N, H, W), and the validity of the groups."""
    image, group = block
    height, width = shape[0], shape[1]
    g = group + tl.arange(0, plan.tile_groups)
    base = (image * plan.groups + g) * (tl.cast(height, tl.int64) * width)
    pixels = rows.to(tl.int64)[:, None] * width + columns[None, :]
    return maps + (base[:, None, None] + pixels[None, :, :]), (g < plan.groups)[:, None, None]


@_jit
def _load_map(maps, block, rows, columns, shape, plan: tl.constexpr, acc: tl.constexpr):
    """Load one map per group, [groups, ROWS, COLUMNS]; 0 outside the image."""
    height, width = shape[0], shape[1]
    pointers, valid = _map_pointers(maps, block, rows, columns, shape, plan)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    return tl.load(pointers, mask=valid & inside[None, :, :], other=0.0).to(acc)


@_jit
def _store_map(maps, values, block, rows, columns, last_row, shape, plan: tl.constexpr):
    width = shape[1]
    pointers, valid = _map_pointers(maps, block, rows, columns, shape, plan)
    inside = (rows < last_row)[:, None] & (columns < width)[None, :]
    tl.store(pointers, values, mask=valid & inside[None, :, :])


@_jit
def _sum_channels(tile, rows: tl.constexpr, columns: tl.constexpr, plan: tl.constexpr):
    """Sum the channels of each group: [K, ROWS, COLUMNS] to [groups, ROWS, COLUMNS]."""
    GROUPS: tl.constexpr = plan.tile_groups
    CHANNELS: tl.constexpr = plan.tile_channels
    return tl.sum(tl.reshape(tile, (GROUPS, CHANNELS, rows, columns)), axis=1)


@_jit
def _spread(maps, rows: tl.constexpr, columns: tl.constexpr, plan: tl.constexpr):
    """Broadcast each group's map to its channels: [groups, ROWS, COLUMNS] to [K, ROWS, COLUMNS]."""
    GROUPS: tl.constexpr = plan.tile_groups
    CHANNELS: tl.constexpr = plan.tile_channels
    spread = tl.broadcast_to(maps[:, None, :, :], (GROUPS, CHANNELS, rows, columns))
    return tl.reshape(spread, (GROUPS * CHANNELS, rows, columns))


@_jit
def _fold(tile, rows: tl.constexpr, columns: tl.constexpr, plan: tl.constexpr):
    """Sum columns that are in the same thread, so that an accumulator takes fewer registers."""
    if plan.fold == 1:
        return tile
    K: tl.constexpr = plan.tile_groups * plan.tile_channels
    FOLD: tl.constexpr = plan.fold
    return tl.sum(tl.reshape(tile, (K, rows, columns // FOLD, FOLD)), axis=3)


@_jit
def _sum_pixels(tile):
    """Sum the pixels: [K, ROWS, COLUMNS] to [K]."""
    return tl.sum(tl.sum(tile, axis=2), axis=1)


@_jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@_jit
def _softmax(logits, valid):
    logits = tl.where(valid, logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits, axis=0))
    return exponentials / tl.sum(exponentials, axis=0)


@_jit
def _softmax_backward(softmax, gradient):
    return softmax * (gradient - tl.sum(softmax * gradient, axis=0))


@_jit
def _load_taps(w3, c, plan: tl.constexpr):
    """Load the weight of the 3×3 convolution, [outputs, block of channels c, 16]; 0 at taps beyond the ninth."""
    o = tl.arange(0, plan.outputs)[:, None, None]
    tap = tl.arange(0, 16)[None, None, :]
    mask = (o < plan.width) & (c < plan.width)[None, :, None] & (tap < 9)
    return tl.load(w3 + _tap_offsets(o, c[None, :, None], tap, plan), mask=mask, other=0.0)


@_jit
def _tap_offsets(o, c, tap, plan: tl.constexpr):
    return (o * 9 + tap) * plan.width + c if plan.taps_last else (o * plan.width + c) * 9 + tap


@_jit
def _load_square(w1, c, plan: tl.constexpr):
    """Load the weight of the 1×1 convolution, [outputs, block of channels c, 1]."""
    o = tl.arange(0, plan.outputs)[:, None, None]
    mask = (o < plan.width) & (c < plan.width)[None, :, None]
    return tl.load(w1 + o * plan.width + c[None, :, None], mask=mask, other=0.0)


# ------------------------------------------------------------------------------------------- phases of the forward


@_jit
def _means(x, mean_parts, block, region, shape, plan: tl.constexpr, ROWS: tl.constexpr):
    """Compute a region's part of the row means and of the column means."""
    COLUMNS: tl.constexpr = plan.tile_columns
    K: tl.constexpr = plan.tile_groups * plan.tile_channels
    height, width, count = shape
    part, span, first_row, last_row, first_column, last_column = region
    first_channel, last_channel = _chunk(plan)
    acc: tl.constexpr = mean_parts.dtype.element_ty
    row_weight = 1.0 / tl.cast(width, acc)
    column_weight = 1.0 / tl.cast(height, acc)
    for c0 in range(first_channel, last_channel, plan.tile_channels):
        channel, base, valid = _channels(block, c0, shape, plan)
        of_rows = mean_parts + (span * count + channel)[:, None] * (height + width)
        of_columns = mean_parts + (part * count + channel)[:, None] * (height + width) + height
        for w0 in range(first_column, last_column, plan.tile_columns):
            columns = w0 + tl.arange(0, plan.tile_columns)
            total = tl.zeros((K, ROWS, COLUMNS), acc)
            for h0 in range(first_row, last_row, ROWS):
                rows = h0 + tl.arange(0, ROWS)
                tile = _load_tile(x, base, valid, rows, columns, last_row, shape, plan, acc)
                total += tile
                mask = valid[:, None] & (rows < last_row)[None, :]
                mean = tl.sum(tile, axis=2) * row_weight
                if plan.tiled:
                    mean += tl.load(of_rows + rows[None, :], mask=mask & (w0 > first_column), other=0.0)
                tl.store(of_rows + rows[None, :], mean, mask=mask)
            column_mask = valid[:, None] & (columns < width)[None, :]
            tl.store(of_columns + columns[None, :], tl.sum(total, axis=1) * column_weight, mask=column_mask)
            if plan.tiled:
                tl.debug_barrier()  # the next tile reads the row means that this one has stored


@_jit
def _gates(means, mean_parts, w1, b1, gates, n, p0, partial: tl.constexpr, shape, grid, plan: tl.constexpr):
    """Compute the gates at a block of positions (rows, then columns) of a group; sum partial means first."""
    OUTPUTS: tl.constexpr = plan.outputs
    INPUTS: tl.constexpr = plan.inputs
    POSITIONS: tl.constexpr = plan.positions
    height, width, count = shape
    parts, spans = grid
    acc: tl.constexpr = means.dtype.element_ty
    o = tl.arange(0, plan.outputs)
    position = p0 + tl.arange(0, plan.positions)
    inside = (position < height + width)[None, :]
    z = tl.zeros((OUTPUTS, POSITIONS), acc)
    z += tl.load(b1 + o, mask=o < plan.width, other=0.0)[:, None]
    for c0 in range(0, plan.width, plan.inputs):
        c = c0 + tl.arange(0, plan.inputs)
        channel = (n * plan.width + c)[:, None]
        mask = (c < plan.width)[:, None] & inside
        offsets = channel * (height + width) + position[None, :]
        if partial:
            mean = tl.zeros((INPUTS, POSITIONS), acc)
            for part in range(tl.maximum(parts, spans)):
                present = tl.where(position < height, part < spans, part < parts)[None, :]
                mean += tl.load(mean_parts + part * count * (height + width) + offsets, mask=mask & present, other=0.0)
            tl.store(means + offsets, mean, mask=mask)
        else:
            mean = tl.load(means + offsets, mask=mask, other=0.0)
        z += tl.sum(_load_square(w1, c, plan) * mean[None, :, :], axis=1)
    pointers = gates + (n * plan.width + o)[:, None] * (height + width) + position[None, :]
    tl.store(pointers, _sigmoid(z), mask=(o < plan.width)[:, None] & inside)


@_jit
def _moments(x, gates, moment_parts, block, region, shape, grid, plan: tl.constexpr, ROWS: tl.constexpr):
    """Compute the means of the gated channels over a region, and their sums of squared deviations.

    Each tile is centred on its own mean, and tiles are combined by the formula of Chan et al., to avoid cancellation.
    """
    COLUMNS: tl.constexpr = plan.tile_columns
    width, count = shape[1], shape[2]
    part, span, first_row, last_row, first_column, last_column = region
    first_channel, last_channel = _chunk(plan)
    acc: tl.constexpr = gates.dtype.element_ty
    K: tl.constexpr = plan.tile_groups * plan.tile_channels
    for c0 in range(first_channel, last_channel, plan.tile_channels):
        channel, base, valid = _channels(block, c0, shape, plan)
        number = tl.cast(0, acc)
        mean = tl.zeros((K,), acc)
        between = tl.zeros((K,), acc)
        within = tl.zeros((K, ROWS, COLUMNS), acc)
        for w0 in range(first_column, last_column, plan.tile_columns):
            columns = w0 + tl.arange(0, plan.tile_columns)
            for h0 in range(first_row, last_row, ROWS):
                rows = h0 + tl.arange(0, ROWS)
                row_gate, column_gate = _load_axes(gates, channel, valid, rows, columns, shape)
                gated = _load_tile(x, base, valid, rows, columns, last_row, shape, plan, acc) * row_gate * column_gate
                pixels = tl.minimum(last_row - h0, ROWS) * tl.minimum(width - w0, plan.tile_columns)
                number_of_tile = tl.cast(pixels, acc)
                mean_of_tile = _sum_pixels(gated) / number_of_tile
                inside = (rows < last_row)[:, None] & (columns < width)[None, :]
                distance = tl.where(inside[None, :, :], gated - mean_of_tile[:, None, None], 0.0)
                within += distance * distance
                share = number_of_tile / (number + number_of_tile)
                delta = mean_of_tile - mean
                between += delta * delta * (number * share)
                mean += delta * share
                number += number_of_tile
        pointers = moment_parts + 2 * (part * grid[1] + span) * count + channel
        tl.store(pointers, mean, mask=valid)
        tl.store(pointers + count, between + _sum_pixels(within), mask=valid)


@_jit
def _combine_moments(moments, moment_parts, n, shape, grid, plan: tl.constexpr):
    """Store and return mean and 1 / standard deviation, [outputs] each, of a group's gated channels."""
    OUTPUTS: tl.constexpr = plan.outputs
    height, width, count = shape
    parts, spans = grid
    acc: tl.constexpr = moments.dtype.element_ty
    o = tl.arange(0, plan.outputs)
    valid = o < plan.width
    rows, columns = _rows_per_part(height, grid), _columns_per_span(width, grid, plan)
    area = tl.cast(height, acc) * tl.cast(width, acc)
    mean = tl.zeros((OUTPUTS,), acc)
    squares = tl.zeros((OUTPUTS,), acc)
    for squared in tl.static_range(2):  # the squared deviations need the mean
        for k0 in range(0, parts * spans, 16):
            k = k0 + tl.arange(0, 16)
            part, span = k // spans, k % spans
            pixels = tl.minimum(height - part * rows, rows) * tl.minimum(width - span * columns, columns)
            number = tl.cast(pixels, acc)[:, None]
            pointers = moment_parts + (2 * k * count)[:, None] + (n * plan.width + o)[None, :]
            mask = (k < parts * spans)[:, None] & valid[None, :]
            mean_of_part = tl.load(pointers, mask=mask, other=0.0)
            if squared:
                distance = tl.where(mask, mean_of_part - mean[None, :], 0.0)
                of_part = tl.load(pointers + count, mask=mask, other=0.0)
                squares += tl.sum(of_part + number * distance * distance, axis=0)
            else:
                mean += tl.sum(mean_of_part * (number / area), axis=0)
    rstd = 1.0 / tl.sqrt(squares / area + plan.eps)
    pointers = moments + n * plan.width + o
    tl.store(pointers, mean, mask=valid)
    tl.store(pointers + count, rstd, mask=valid)
    return mean, rstd


@_jit
def _mixing(x, means, mean, rstd, w3, b3, gamma, beta, mixing, n, backward: tl.constexpr, shape, plan: tl.constexpr):
    """Compute the mixing coefficients of a group, and store them in the planes of ``mixing``."""
    OUTPUTS: tl.constexpr = plan.outputs
    SQUARE: tl.constexpr = plan.square
    POSITIONS: tl.constexpr = plan.positions
    height, width, count = shape
    acc: tl.constexpr = means.dtype.element_ty
    area = tl.cast(height, acc) * tl.cast(width, acc)
    o = tl.arange(0, plan.outputs)
    valid = o < plan.width
    beta_of = tl.load(beta + o, mask=valid, other=0.0)
    bias = tl.load(b3 + o, mask=valid, other=0.0)
    a1 = _softmax(mean if plan.dynamic else beta_of, valid)

    tap = tl.arange(0, 16)[None, :]
    sums = tl.zeros((OUTPUTS,), acc)
    for c0 in range(0, plan.width, plan.square):
        c = c0 + tl.arange(0, plan.square)
        inside = (c < plan.width)[:, None]
        channel = (n * plan.width + c)[:, None]
        start = means + channel * (height + width)
        of_rows = tl.zeros((SQUARE, POSITIONS), acc)
        for h0 in range(0, height, plan.positions):
            row = h0 + tl.arange(0, plan.positions)[None, :]
            of_rows += tl.load(start + row, mask=inside & (row < height), other=0.0)
        # Taps in row 0 of the kernel never see the last row, taps in row 2 never the first; columns likewise.
        row_left_out = tl.where(tap < 3, height - 1, 0)
        column_left_out = tl.where(tap % 3 == 0, width - 1, 0)
        in_row = inside & (tap // 3 != 1) & (tap < 9)
        in_column = inside & (tap % 3 != 1) & (tap < 9)
        shifted = tl.zeros((SQUARE, 16), acc) + (tl.sum(of_rows, axis=1) * width)[:, None]
        shifted -= tl.load(start + row_left_out, mask=in_row, other=0.0) * width
        shifted -= tl.load(start + height + column_left_out, mask=in_column, other=0.0) * height
        pixel = row_left_out.to(tl.int64) * width + column_left_out
        if plan.last:
            image = n // plan.groups
            in_image = channel - image * (plan.groups * plan.width)
            corner = x + (image * height * width + pixel) * (plan.groups * plan.width) + in_image
        else:
            corner = x + channel * (tl.cast(height, tl.int64) * width) + pixel
        shifted += tl.load(corner, mask=in_row & in_column, other=0.0).to(acc)

        weight = _load_taps(w3, c, plan)
        sums += tl.sum(tl.sum(weight * shifted[None, :, :], axis=2), axis=1)
        pointers = mixing + tap * count + channel
        tl.store(pointers + _KERNEL * count, tl.sum(weight * a1[:, None, None], axis=0), mask=inside & (tap < 9))
        if backward:
            tl.store(pointers + _SHIFTED * count, shifted, mask=inside & (tap < 9))

    a2 = _softmax(bias + sums / area, valid)
    kappa = a2 * tl.load(gamma + o, mask=valid, other=0.0) * rstd
    constant = tl.sum(a1 * bias + a2 * beta_of, axis=0)
    pointers = mixing + n * plan.width + o
    tl.store(pointers + _KAPPA * count, kappa, mask=valid)
    tl.store(pointers + _LOGIT * count, tl.zeros_like(kappa) + constant, mask=o == 0)
    if backward:
        tl.store(pointers + _A1 * count, a1, mask=valid)
        tl.store(pointers + _A2 * count, a2, mask=valid)


@_jit
def _weights(x, gates, moments, mixing, block, rows, w0, shape, plan: tl.constexpr, ROWS: tl.constexpr):
    """Compute the weight map, [groups, ROWS, COLUMNS]."""
    GROUPS: tl.constexpr = plan.tile_groups
    COLUMNS: tl.constexpr = plan.tile_columns
    image, group = block
    height = shape[0]
    acc: tl.constexpr = gates.dtype.element_ty
    if plan.last:
        logit = tl.zeros((GROUPS, ROWS, COLUMNS), acc)
        columns = w0 + tl.arange(0, COLUMNS)
        for c0 in range(0, plan.width, plan.tile_channels):
            channel, base, valid = _channels(block, c0, shape, plan)
            row_gate, column_gate = _load_axes(gates, channel, valid, rows, columns, shape)
            tile = _load_tile(x, base, valid, rows, columns, height, shape, plan, acc)
            centred = tile * row_gate * column_gate - _load_plane(moments, 0, channel, valid, shape)
            total = _load_plane(mixing, _KAPPA, channel, valid, shape) * centred
            for tap in tl.static_range(9):
                rows_of_tap, columns_of_tap = rows + (tap // 3 - 1), columns + (tap % 3 - 1)
                tile = _load_tile(x, base, valid, rows_of_tap, columns_of_tap, height, shape, plan, acc)
                total += _load_plane(mixing, _KERNEL + tap, channel, valid, shape) * tile
            logit += _sum_channels(total, ROWS, COLUMNS, plan)
    else:
        logit = _shifted_logit(x, gates, moments, mixing, block, rows, w0, shape, plan, ROWS)
    g = group + tl.arange(0, plan.tile_groups)
    first_channel = (image * plan.groups + g) * plan.width
    logit += _load_plane(mixing, _LOGIT, first_channel, g < plan.groups, shape)
    return _sigmoid(logit)


@_jit
def _shifted_logit(x, gates, moments, mixing, block, rows, w0, shape, plan: tl.constexpr, ROWS: tl.constexpr):
    """Compute the logit of a contiguous input's weight map, but for its constant, [groups, ROWS, COLUMNS].

    Shifted by a column, loads would no longer be wide. So the products of each kernel column are summed over the
    channels before they are shifted, and x is read at the tile's own columns only, and at one more on each side if a
    row has several tiles.
    """
    GROUPS: tl.constexpr = plan.tile_groups
    COLUMNS: tl.constexpr = plan.tile_columns
    K: tl.constexpr = plan.tile_groups * plan.tile_channels
    height = shape[0]
    acc: tl.constexpr = gates.dtype.element_ty
    column = tl.arange(0, COLUMNS)
    left = tl.zeros((GROUPS, ROWS, COLUMNS), acc)
    middle = tl.zeros((GROUPS, ROWS, COLUMNS), acc)
    right = tl.zeros((GROUPS, ROWS, COLUMNS), acc)
    before = tl.zeros((GROUPS, ROWS, 1), acc)
    after = tl.zeros((GROUPS, ROWS, 1), acc)
    for c0 in range(0, plan.width, plan.tile_channels):
        channel, base, valid = _channels(block, c0, shape, plan)
        row_gate, column_gate = _load_axes(gates, channel, valid, rows, w0 + column, shape)
        mean = _load_plane(moments, 0, channel, valid, shape)
        kappa = _load_plane(mixing, _KAPPA, channel, valid, shape)
        taps_left = tl.zeros((K, ROWS, COLUMNS), acc)
        taps_middle = tl.zeros((K, ROWS, COLUMNS), acc)
        taps_right = tl.zeros((K, ROWS, COLUMNS), acc)
        taps_before = tl.zeros((K, ROWS, 1), acc)
        taps_after = tl.zeros((K, ROWS, 1), acc)
        for i in tl.static_range(3):
            kernel_left = _load_plane(mixing, _KERNEL + 3 * i, channel, valid, shape)
            kernel_right = _load_plane(mixing, _KERNEL + 3 * i + 2, channel, valid, shape)
            tile = _load_tile(x, base, valid, rows + (i - 1), w0 + column, height, shape, plan, acc)
            taps_left += kernel_left * tile
            taps_middle += _load_plane(mixing, _KERNEL + 3 * i + 1, channel, valid, shape) * tile
            taps_right += kernel_right * tile
            if i == 1:
                taps_middle += kappa * (tile * row_gate * column_gate - mean)
            if plan.tiled:
                end = _load_column(x, base, valid, rows + (i - 1), w0 - 1, shape, plan, acc)
                taps_before += kernel_left * end
                end = _load_column(x, base, valid, rows + (i - 1), w0 + COLUMNS, shape, plan, acc)
                taps_after += kernel_right * end
        left += _sum_channels(taps_left, ROWS, COLUMNS, plan)
        middle += _sum_channels(taps_middle, ROWS, COLUMNS, plan)
        right += _sum_channels(taps_right, ROWS, COLUMNS, plan)
        if plan.tiled:
            before += _sum_channels(taps_before, ROWS, 1, plan)
            after += _sum_channels(taps_after, ROWS, 1, plan)

    column = tl.broadcast_to(column[None, None, :], (GROUPS, ROWS, COLUMNS))
    logit = middle
    logit += tl.where(column == 0, before, tl.gather(left, tl.maximum(column - 1, 0), 2))
    logit += tl.where(column == COLUMNS - 1, after, tl.gather(right, tl.minimum(column + 1, COLUMNS - 1), 2))
    return logit


@_jit
def _output(x, y, gates, moments, mixing, block, region, shape, plan: tl.constexpr, ROWS: tl.constexpr):
    """Compute the output in a region: x times the weight map."""
    width = shape[1]
    _part, _span, first_row, last_row, first_column, last_column = region
    acc: tl.constexpr = gates.dtype.element_ty
    for h0 in range(first_row, last_row, ROWS):
        rows = h0 + tl.arange(0, ROWS)
        for w0 in range(first_column, last_column, plan.tile_columns):
            columns = w0 + tl.arange(0, plan.tile_columns)
            weights = _weights(x, gates, moments, mixing, block, rows, w0, shape, plan, ROWS)
            weights = _spread(weights, ROWS, plan.tile_columns, plan)
            inside = ((rows < last_row)[:, None] & (columns < width)[None, :])[None, :, :]
            for c0 in range(0, plan.width, plan.tile_channels):
                _, base, valid = _channels(block, c0, shape, plan)
                offsets = base[:, None, None] + _pixels(rows, columns, shape, plan)[None, :, :]
                mask = valid[:, None, None] & inside
                tile = tl.load(x + offsets, mask=mask, other=0.0).to(acc)
                tl.store(y + offsets, tile * weights, mask=mask, cache_modifier=plan.store)


@_kernel
def forward_kernel(
    x,
    y,
    means,
    moments,
    w1,
    b1,
    w3,
    b3,
    gamma,
    beta,
    gates,
    mixing,
    mean_parts,
    moment_parts,
    height,
    width_in_units,
    count,
    first,
    parts,
    spans,
    family,
    plan: tl.constexpr,
    PHASE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Run one phase of the forward for the blocks from ``first`` on, or all phases if PHASE is "all"."""
    FITTING: tl.constexpr = TILE // (plan.tile_groups * plan.tile_channels * plan.tile_columns)
    ROWS: tl.constexpr = plan.tile_rows if plan.tile_rows < FITTING else FITTING
    # Memory-bound phases take larger tiles, to have more loads in flight.
    MORE_ROWS: tl.constexpr = plan.tile_rows if plan.tile_rows < 4 * FITTING else 4 * FITTING
    REVERSE: tl.constexpr = PHASE == "moments"
    shape = (height, width_in_units * plan.unit, tl.cast(count, tl.int64))  # the constant factor allows wide loads
    grid = (parts, spans)
    block = _block(first, REVERSE, plan)
    region = _region(shape, grid, REVERSE, plan)
    image, group = block
    n = image * plan.groups + group
    number = tl.minimum(plan.groups - group, plan.tile_groups)

    if PHASE == "all" or PHASE == "means":
        _means(x, mean_parts if plan.partial else means, block, region, shape, plan, MORE_ROWS)
    if PHASE == "gates":
        _gates(means, mean_parts, w1, b1, gates, n, tl.program_id(1) * plan.positions, plan.partial, shape, grid, plan)
    if PHASE == "all":
        tl.debug_barrier()
        for k in range(number):
            for p0 in range(0, height + width_in_units * plan.unit, plan.positions):
                _gates(means, mean_parts, w1, b1, gates, n + k, p0, False, shape, grid, plan)
        tl.debug_barrier()
    if PHASE == "all" or PHASE == "moments":
        _moments(x, gates, moment_parts, block, region, shape, grid, plan, MORE_ROWS)
    if PHASE == "all":
        tl.debug_barrier()
    if PHASE == "all" or PHASE == "mixing":
        for k in range(number):
            mean, rstd = _combine_moments(moments, moment_parts, n + k, shape, grid, plan)
            _mixing(x, means, mean, rstd, w3, b3, gamma, beta, mixing, n + k, False, shape, plan)
    if PHASE == "all":
        tl.debug_barrier()
    if PHASE == "all" or PHASE == "output":
        _output(x, y, gates, moments, mixing, block, region, shape, plan, ROWS)


# ------------------------------------------------------------------------------------------ phases of the backward


@_jit
def _logit_gradient(
    x,
    dy,
    gates,
    moments,
    mixing,
    weights,
    dlogits,
    block,
    rows,
    w0,
    last_row,
    shape,
    plan: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute, store and return the gradient of the weights' logit, [groups, ROWS, COLUMNS]; 0 outside the region.

    Store the weights, too, if the groups are wide: for a few channels it costs less to compute them again.
    """
    GROUPS: tl.constexpr = plan.tile_groups
    COLUMNS: tl.constexpr = plan.tile_columns
    width = shape[1]
    acc: tl.constexpr = gates.dtype.element_ty
    columns = w0 + tl.arange(0, plan.tile_columns)
    weight = _weights(x, gates, moments, mixing, block, rows, w0, shape, plan, ROWS)
    dweight = tl.zeros((GROUPS, ROWS, COLUMNS), acc)
    for c0 in range(0, plan.width, plan.tile_channels):
        _, base, valid = _channels(block, c0, shape, plan)
        tile = _load_tile(x, base, valid, rows, columns, last_row, shape, plan, acc)
        tile *= _load_tile(dy, base, valid, rows, columns, last_row, shape, plan, acc)
        dweight += _sum_channels(tile, ROWS, plan.tile_columns, plan)
    inside = (rows < last_row)[:, None] & (columns < width)[None, :]
    dlogit = tl.where(inside[None, :, :], dweight * weight * (1.0 - weight), 0.0)
    if plan.stores_weights:
        _store_map(weights, weight, block, rows, columns, last_row, shape, plan)
    _store_map(dlogits, dlogit, block, rows, columns, last_row, shape, plan)
    return dlogit


@_jit
def _logit_gradients(
    x,
    dy,
    gates,
    moments,
    mixing,
    weights,
    dlogits,
    block,
    region,
    shape,
    plan: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the gradient of the weights' logit in a region, for ``_products`` whose tiles are parts of groups."""
    _part, _span, first_row, last_row, first_column, last_column = region
    for h0 in range(first_row, last_row, ROWS):
        rows = h0 + tl.arange(0, ROWS)
        for w0 in range(first_column, last_column, plan.tile_columns):
            _logit_gradient(
                x, dy, gates, moments, mixing, weights, dlogits, block, rows, w0, last_row, shape, plan, ROWS
            )


@_jit
def _products(
    x,
    dy,
    gates,
    moments,
    mixing,
    weights,
    dlogits,
    dlogit_parts,
    sum_parts,
    product_parts,
    block,
    region,
    shape,
    grid,
    plan: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the gradient of the logit in a region, and sum its products with the channels.

    With u the gated channel: sums along rows and along columns of u · dlogit, u · (u - mean) and u; sums over all
    pixels of dlogit, of (u - mean) · dlogit and, for each tap, of the shifted x · dlogit. If a tile is only a part of a
    group, ``_logit_gradients`` has computed the gradient.
    """
    GROUPS: tl.constexpr = plan.tile_groups
    COLUMNS: tl.constexpr = plan.tile_columns
    K: tl.constexpr = plan.tile_groups * plan.tile_channels
    FOLDED: tl.constexpr = COLUMNS // plan.fold
    image, group = block
    height, width, count = shape
    part, span, first_row, last_row, first_column, last_column = region
    first_channel, last_channel = _chunk(plan)
    acc: tl.constexpr = gates.dtype.element_ty
    column = tl.broadcast_to(tl.arange(0, COLUMNS)[None, None, :], (GROUPS, ROWS, COLUMNS))
    program = part * grid[1] + span
    total = tl.zeros((GROUPS, ROWS, COLUMNS), acc)
    for c0 in range(first_channel, last_channel, plan.tile_channels):
        channel, base, valid = _channels(block, c0, shape, plan)
        mean = _load_plane(moments, 0, channel, valid, shape)
        taps = ()
        for _ in tl.static_range(9):
            taps += (tl.zeros((K, ROWS, FOLDED), acc),)
        ends = ()  # of the left and right columns of taps: products with pixels of the tiles beside this one
        for _ in tl.static_range(6):
            ends += (tl.zeros((K, ROWS, 1), acc),)
        correlation = tl.zeros((K, ROWS, FOLDED), acc)
        of_rows = sum_parts + (span * 3 * count + channel)[:, None] * (height + width)
        of_columns = sum_parts + (part * 3 * count + channel)[:, None] * (height + width) + height
        next_sum = count * (height + width)
        for w0 in range(first_column, last_column, COLUMNS):
            columns = w0 + tl.arange(0, COLUMNS)
            with_dlogit = tl.zeros((K, ROWS, COLUMNS), acc)
            with_centred = tl.zeros((K, ROWS, COLUMNS), acc)
            alone = tl.zeros((K, ROWS, COLUMNS), acc)
            for h0 in range(first_row, last_row, ROWS):
                rows = h0 + tl.arange(0, ROWS)
                if plan.tile_channels < plan.width:
                    dlogit_of_group = _load_map(dlogits, block, rows, columns, shape, plan, acc)
                    dlogit_of_group = tl.where((rows < last_row)[None, :, None], dlogit_of_group, 0.0)
                else:
                    dlogit_of_group = _logit_gradient(
                        x, dy, gates, moments, mixing, weights, dlogits, block, rows, w0, last_row, shape, plan, ROWS
                    )
                total += tl.where(c0 == first_channel, dlogit_of_group, 0.0)
                tile = _load_tile(x, base, valid, rows, columns, last_row, shape, plan, acc)
                dlogit = _spread(dlogit_of_group, ROWS, COLUMNS, plan)
                # The pixel at column w sees x at w + j - 1 through a tap in column j of the kernel.
                if plan.last:
                    added = ()
                    for tap in tl.static_range(9):
                        rows_of_tap, columns_of_tap = rows + (tap // 3 - 1), columns + (tap % 3 - 1)
                        seen = _load_tile(x, base, valid, rows_of_tap, columns_of_tap, height, shape, plan, acc)
                        added += (taps[tap] + dlogit * seen,)
                    taps = added
                else:  # shift the gradient, as ``_shifted_logit`` does
                    above = _load_tile(x, base, valid, rows - 1, columns, height, shape, plan, acc)
                    below = _load_tile(x, base, valid, rows + 1, columns, height, shape, plan, acc)
                    left = tl.gather(dlogit_of_group, tl.minimum(column + 1, COLUMNS - 1), 2)
                    right = tl.gather(dlogit_of_group, tl.maximum(column - 1, 0), 2)
                    dlogits_seen = (
                        _spread(tl.where(column == COLUMNS - 1, 0.0, left), ROWS, COLUMNS, plan),
                        dlogit,
                        _spread(tl.where(column == 0, 0.0, right), ROWS, COLUMNS, plan),
                    )
                    neighbours = (above, tile, below)
                    added = ()
                    for tap in tl.static_range(9):
                        product = dlogits_seen[tap % 3] * neighbours[tap // 3]
                        added += (taps[tap] + _fold(product, ROWS, COLUMNS, plan),)
                    taps = added
                if plan.tiled and not plan.last:
                    first = tl.sum(tl.where(column == 0, dlogit_of_group, 0.0), axis=2, keep_dims=True)
                    last = tl.sum(tl.where(column == COLUMNS - 1, dlogit_of_group, 0.0), axis=2, keep_dims=True)
                    of_ends = (_spread(first, ROWS, 1, plan), _spread(last, ROWS, 1, plan))
                    added = ()
                    for end in tl.static_range(6):
                        column_of_end = w0 - 1 if end % 2 == 0 else w0 + COLUMNS
                        pixels = _load_column(x, base, valid, rows + (end // 2 - 1), column_of_end, shape, plan, acc)
                        added += (ends[end] + of_ends[end % 2] * pixels,)
                    ends = added

                row_gate, column_gate = _load_axes(gates, channel, valid, rows, columns, shape)
                gated = tile * row_gate * column_gate
                centred = gated - mean
                correlation += _fold(dlogit * centred, ROWS, COLUMNS, plan)
                dlogit *= gated
                centred *= gated
                with_dlogit += dlogit
                with_centred += centred
                alone += gated
                mask = valid[:, None] & (rows < last_row)[None, :]
                sums = (tl.sum(dlogit, axis=2), tl.sum(centred, axis=2), tl.sum(gated, axis=2))
                for kind in tl.static_range(3):
                    pointers = of_rows + kind * next_sum + rows[None, :]
                    of_row = sums[kind]
                    if plan.tiled:
                        of_row += tl.load(pointers, mask=mask & (w0 > first_column), other=0.0)
                    tl.store(pointers, of_row, mask=mask)
            column_mask = valid[:, None] & (columns < width)[None, :]
            tl.store(of_columns + columns[None, :], tl.sum(with_dlogit, axis=1), mask=column_mask)
            tl.store(of_columns + next_sum + columns[None, :], tl.sum(with_centred, axis=1), mask=column_mask)
            tl.store(of_columns + 2 * next_sum + columns[None, :], tl.sum(alone, axis=1), mask=column_mask)
            if plan.tiled:
                tl.debug_barrier()  # the next tile reads the row sums that this one has stored
        of_pixels = product_parts + program * 10 * count + channel
        for tap in tl.static_range(9):
            product = _sum_pixels(taps[tap])
            if plan.tiled and not plan.last and tap % 3 != 1:
                product += _sum_pixels(ends[tap // 3 * 2 + tap % 3 // 2])
            tl.store(of_pixels + tap * count, product, mask=valid)
        tl.store(of_pixels + 9 * count, _sum_pixels(correlation), mask=valid)
    g = group + tl.arange(0, plan.tile_groups)
    pointers = dlogit_parts + program * (count // plan.width) + image * plan.groups + g
    tl.store(pointers, _sum_pixels(total), mask=g < plan.groups)


@_jit
def _small_gradients(
    moments,
    w3,
    b3,
    gamma,
    beta,
    mixing,
    dlogit_parts,
    product_parts,
    shares,
    n,
    shape,
    grid,
    plan: tl.constexpr,
):
    """Compute the gradients of a group's mixing coefficients, and its shares of db3, dgamma and dbeta."""
    OUTPUTS: tl.constexpr = plan.outputs
    SQUARE: tl.constexpr = plan.square
    height, width, count = shape
    regions = grid[0] * grid[1]
    acc: tl.constexpr = moments.dtype.element_ty
    area = tl.cast(height, acc) * tl.cast(width, acc)
    o = tl.arange(0, plan.outputs)
    valid = o < plan.width
    pointers = mixing + n * plan.width + o
    rstd = tl.load(moments + count + n * plan.width + o, mask=valid, other=0.0)
    a1 = tl.load(pointers + _A1 * count, mask=valid, other=0.0)
    a2 = tl.load(pointers + _A2 * count, mask=valid, other=0.0)
    kappa = tl.load(pointers + _KAPPA * count, mask=valid, other=0.0)

    dconstants = tl.zeros((16,), acc)
    correlations = tl.zeros((16, OUTPUTS), acc)
    for k0 in range(0, regions, 16):
        k = k0 + tl.arange(0, 16)
        dconstants += tl.load(dlogit_parts + k * (count // plan.width) + n, mask=k < regions, other=0.0)
        of_parts = product_parts + ((10 * k + 9) * count)[:, None] + (n * plan.width + o)[None, :]
        correlations += tl.load(of_parts, mask=(k < regions)[:, None] & valid[None, :], other=0.0)
    dconstant = tl.sum(dconstants, axis=0)
    correlation = tl.sum(correlations, axis=0)
    da2 = tl.load(gamma + o, mask=valid, other=0.0) * rstd * correlation
    da2 += tl.load(beta + o, mask=valid, other=0.0) * dconstant
    dm2 = _softmax_backward(a2, da2)
    da1 = tl.load(b3 + o, mask=valid, other=0.0) * dconstant
    tap = tl.arange(0, 16)[None, :]
    for c0 in range(0, plan.width, plan.square):
        c = c0 + tl.arange(0, plan.square)
        mask = (c < plan.width)[:, None] & (tap < 9)
        of_taps = tap * count + (n * plan.width + c)[:, None]
        dkernels = tl.zeros((16, SQUARE, 16), acc)
        for k0 in range(0, regions, 16):
            k = (k0 + tl.arange(0, 16))[:, None, None]
            of_parts = product_parts + 10 * k * count + of_taps[None, :, :]
            dkernels += tl.load(of_parts, mask=(k < regions) & mask[None, :, :], other=0.0)
        dkernel = tl.sum(dkernels, axis=0)
        weight = _load_taps(w3, c, plan)
        da1 += tl.sum(tl.sum(weight * dkernel[None, :, :], axis=2), axis=1)
        dshifted = tl.sum(weight * dm2[:, None, None], axis=0) / area
        tl.store(mixing + _DKERNEL * count + of_taps, dkernel, mask=mask)
        tl.store(mixing + _DSHIFTED * count + of_taps, dshifted, mask=mask)

    offset = -kappa * dconstant
    if plan.dynamic:
        offset += _softmax_backward(a1, da1)
    tl.store(pointers + _ALPHA * count, -kappa * rstd * rstd * correlation / area, mask=valid)
    tl.store(pointers + _OFFSET * count, offset / area, mask=valid)
    tl.store(pointers + _DM2 * count, dm2, mask=valid)
    share = shares + n * 4 * plan.width + o
    tl.store(share, a1 * dconstant + dm2, mask=valid)
    tl.store(share + plan.width, a2 * rstd * correlation, mask=valid)
    tl.store(share + 2 * plan.width, a2 * dconstant, mask=valid)
    tl.store(share + 3 * plan.width, da1, mask=valid)


@_jit
def _means_gradient(
    means,
    gates,
    w1,
    mixing,
    sum_parts,
    dmeans,
    position_shares,
    n,
    share,
    first_position,
    last_position,
    shape,
    grid,
    plan: tl.constexpr,
):
    """Compute the gradient of some of a group's means through gates and shifted sums, and a share of dw1 and db1."""
    OUTPUTS: tl.constexpr = plan.outputs
    INPUTS: tl.constexpr = plan.inputs
    POSITIONS: tl.constexpr = plan.positions
    height, width, count = shape
    parts, spans = grid
    acc: tl.constexpr = means.dtype.element_ty
    o = tl.arange(0, plan.outputs)
    valid = o < plan.width
    channel_o = (n * plan.width + o)[:, None]
    tap = tl.arange(0, 16)[None, :]
    next_sum = count * (height + width)
    kappa = _load_plane(mixing, _KAPPA, n * plan.width + o, valid, shape)
    alpha = _load_plane(mixing, _ALPHA, n * plan.width + o, valid, shape)
    offset = _load_plane(mixing, _OFFSET, n * plan.width + o, valid, shape)
    of_share = position_shares + share * ((plan.width + 1) * plan.width)
    for c0 in range(0, plan.width, plan.inputs):
        c = c0 + tl.arange(0, plan.inputs)
        channel_c = (n * plan.width + c)[:, None]
        weight = _load_square(w1, c, plan)
        tap_mask = (c < plan.width)[:, None] & (tap < 9)
        dshifted = tl.load(mixing + (_DSHIFTED + tap) * count + channel_c, mask=tap_mask, other=0.0)
        # A tap's sum covers all pixels except the row and the column that it never sees.
        of_all = tl.sum(dshifted, axis=1)[:, None]
        of_last_row = tl.sum(tl.where(tap // 3 == 0, dshifted, 0.0), axis=1)[:, None]
        of_first_row = tl.sum(tl.where(tap // 3 == 2, dshifted, 0.0), axis=1)[:, None]
        of_last_column = tl.sum(tl.where(tap % 3 == 0, dshifted, 0.0), axis=1)[:, None]
        of_first_column = tl.sum(tl.where(tap % 3 == 2, dshifted, 0.0), axis=1)[:, None]
        dweight = tl.zeros((OUTPUTS, INPUTS), acc)
        dbias = tl.zeros((OUTPUTS, POSITIONS), acc)
        for p0 in range(first_position, last_position, plan.positions):
            position = p0 + tl.arange(0, plan.positions)[None, :]
            in_rows = position < height
            mask_o = valid[:, None] & (position < height + width)
            of_positions = channel_o * (height + width) + position
            with_dlogit = tl.zeros((OUTPUTS, POSITIONS), acc)
            with_centred = tl.zeros((OUTPUTS, POSITIONS), acc)
            alone = tl.zeros((OUTPUTS, POSITIONS), acc)
            for part in range(tl.maximum(parts, spans)):
                mask = mask_o & tl.where(in_rows, part < spans, part < parts)
                pointers = sum_parts + part * 3 * next_sum + of_positions
                with_dlogit += tl.load(pointers, mask=mask, other=0.0)
                with_centred += tl.load(pointers + next_sum, mask=mask, other=0.0)
                alone += tl.load(pointers + 2 * next_sum, mask=mask, other=0.0)
            gate = tl.load(gates + of_positions, mask=mask_o, other=0.0)
            # The sums contain u, and so the first factor of the sigmoid's derivative, gate · (1 - gate).
            dz = (kappa * with_dlogit[:, None, :] + alpha * with_centred[:, None, :] + offset * alone[:, None, :]) * (
                1.0 - gate[:, None, :]
            )
            mask = (c < plan.width)[:, None] & (position < height + width)
            of_positions = channel_c * (height + width) + position
            mean = tl.load(means + of_positions, mask=mask, other=0.0)
            dbias += tl.sum(dz, axis=1)
            dweight += tl.sum(dz * mean[None, :, :], axis=2)
            dmean = tl.sum(dz * weight, axis=0) / tl.where(in_rows, width, height).to(acc)
            dmean += tl.where(in_rows, of_all, 0.0)
            dmean -= tl.where(position == 0, of_first_row, 0.0)
            dmean -= tl.where(position == height - 1, of_last_row, 0.0)
            dmean -= tl.where(position == height, of_first_column, 0.0)
            dmean -= tl.where(position == height + width - 1, of_last_column, 0.0)
            tl.store(dmeans + of_positions, dmean, mask=mask)
        square_mask = valid[:, None] & (c < plan.width)[None, :]
        tl.store(of_share + o[:, None] * plan.width + c[None, :], dweight, mask=square_mask)
        tl.store(of_share + plan.width * plan.width + o, tl.sum(dbias, axis=1), mask=valid)


@_jit
def _input_gradient(
    x,
    dy,
    dx,
    gates,
    moments,
    mixing,
    weights,
    dlogits,
    dmeans,
    block,
    region,
    shape,
    plan: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the gradient of x in a region."""
    height, width = shape[0], shape[1]
    _part, _span, first_row, last_row, first_column, last_column = region
    acc: tl.constexpr = gates.dtype.element_ty
    COLUMNS: tl.constexpr = plan.tile_columns
    for h0 in range(first_row, last_row, ROWS):
        rows = h0 + tl.arange(0, ROWS)
        at_border = (h0 == 0) | (h0 + ROWS >= height)
        for w0 in range(first_column, last_column, COLUMNS):
            columns = w0 + tl.arange(0, COLUMNS)
            inside = ((rows < last_row)[:, None] & (columns < width)[None, :])[None, :, :]
            if plan.stores_weights:
                weight = _load_map(weights, block, rows, columns, shape, plan, acc)
            else:
                weight = _weights(x, gates, moments, mixing, block, rows, w0, shape, plan, ROWS)
            weight = _spread(weight, ROWS, COLUMNS, plan)
            # Tap (i, j) of the kernel at pixel (h + 1 - i, w + 1 - j) reads pixel (h, w).
            taps = ()
            for tap in tl.static_range(9):
                rows_of_tap, columns_of_tap = rows + (1 - tap // 3), columns + (1 - tap % 3)
                taps += (_load_map(dlogits, block, rows_of_tap, columns_of_tap, shape, plan, acc),)
            for c0 in range(0, plan.width, plan.tile_channels):
                channel, base, valid = _channels(block, c0, shape, plan)
                offsets = base[:, None, None] + _pixels(rows, columns, shape, plan)[None, :, :]
                mask = valid[:, None, None] & inside
                tile = tl.load(x + offsets, mask=mask, other=0.0).to(acc)
                total = tl.load(dy + offsets, mask=mask, other=0.0).to(acc) * weight
                drow, dcolumn = _load_axes(dmeans, channel, valid, rows, columns, shape)
                total += drow + dcolumn
                row_gate, column_gate = _load_axes(gates, channel, valid, rows, columns, shape)
                mean = _load_plane(moments, 0, channel, valid, shape)
                dgated = _load_plane(mixing, _ALPHA, channel, valid, shape) * (tile * row_gate * column_gate - mean)
                dgated += _load_plane(mixing, _OFFSET, channel, valid, shape)
                dlogit = _spread(taps[4], ROWS, COLUMNS, plan)
                dgated += _load_plane(mixing, _KAPPA, channel, valid, shape) * dlogit
                total += dgated * row_gate * column_gate
                for tap in tl.static_range(9):
                    dlogit = _spread(taps[tap], ROWS, COLUMNS, plan)
                    total += _load_plane(mixing, _KERNEL + tap, channel, valid, shape) * dlogit
                if at_border:
                    # Add the corners, which a border row and a border column have both subtracted.
                    first = (columns == 0)[None, None, :]
                    last = (columns == width - 1)[None, None, :]
                    corners = tl.where(first, _load_plane(mixing, _DSHIFTED + 8, channel, valid, shape), 0.0)
                    corners += tl.where(last, _load_plane(mixing, _DSHIFTED + 6, channel, valid, shape), 0.0)
                    total += tl.where((rows == 0)[None, :, None], corners, 0.0)
                    corners = tl.where(first, _load_plane(mixing, _DSHIFTED + 2, channel, valid, shape), 0.0)
                    corners += tl.where(last, _load_plane(mixing, _DSHIFTED + 0, channel, valid, shape), 0.0)
                    total += tl.where((rows == height - 1)[None, :, None], corners, 0.0)
                tl.store(dx + offsets, total, mask=mask, cache_modifier=plan.store)


@_kernel
def backward_kernel(
    dy,
    x,
    dx,
    means,
    moments,
    w1,
    b1,
    w3,
    b3,
    gamma,
    beta,
    gates,
    mixing,
    weights,
    dlogits,
    dlogit_parts,
    sum_parts,
    product_parts,
    dmeans,
    shares,
    position_shares,
    height,
    width_in_units,
    count,
    first,
    parts,
    spans,
    family,
    plan: tl.constexpr,
    PHASE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Run one phase of the backward for the blocks from ``first`` on, or all phases if PHASE is "all".

    ``weights`` and ``dlogits`` hold the maps of these blocks only.
    """
    FITTING: tl.constexpr = TILE // (plan.tile_groups * plan.tile_channels * plan.tile_columns)
    ROWS: tl.constexpr = plan.tile_rows if plan.tile_rows < FITTING else FITTING
    PARTIAL_TILES: tl.constexpr = plan.tile_channels < plan.width
    REVERSE: tl.constexpr = PHASE == "products" if PARTIAL_TILES else PHASE == "input"
    shape = (height, width_in_units * plan.unit, tl.cast(count, tl.int64))  # the constant factor allows wide loads
    grid = (parts, spans)
    block = _block(first, REVERSE, plan)
    region = _region(shape, grid, REVERSE, plan)
    image, group = block
    n = image * plan.groups + group
    number = tl.minimum(plan.groups - group, plan.tile_groups)
    positions = height + width_in_units * plan.unit
    if PHASE == "logit" or PHASE == "products" or PHASE == "input":
        blocks = (plan.groups + plan.tile_groups - 1) // plan.tile_groups
        origin = (first // blocks * plan.groups + first % blocks * plan.tile_groups).to(tl.int64)
        weights -= origin * height * shape[1]
        dlogits -= origin * height * shape[1]

    if PHASE == "all":
        for k in range(number):
            for p0 in range(0, positions, plan.positions):
                _gates(means, means, w1, b1, gates, n + k, p0, False, shape, grid, plan)
    if PHASE == "mixing" and tl.program_id(1) > 0:  # a group's first program computes the mixing
        _gates(means, means, w1, b1, gates, n, (tl.program_id(1) - 1) * plan.positions, False, shape, grid, plan)
    if PHASE == "all" or (PHASE == "mixing" and tl.program_id(1) == 0):
        for k in range(number):
            channel = (n + k) * plan.width + tl.arange(0, plan.outputs)
            valid = tl.arange(0, plan.outputs) < plan.width
            mean = tl.load(moments + channel, mask=valid, other=0.0)
            rstd = tl.load(moments + count + channel, mask=valid, other=0.0)
            _mixing(x, means, mean, rstd, w3, b3, gamma, beta, mixing, n + k, True, shape, plan)
    if PHASE == "all":
        tl.debug_barrier()
    if PHASE == "logit" or (PHASE == "all" and PARTIAL_TILES):
        _logit_gradients(x, dy, gates, moments, mixing, weights, dlogits, block, region, shape, plan, ROWS)
    if PHASE == "all" and PARTIAL_TILES:
        tl.debug_barrier()
    if PHASE == "all" or PHASE == "products":
        _products(
            x,
            dy,
            gates,
            moments,
            mixing,
            weights,
            dlogits,
            dlogit_parts,
            sum_parts,
            product_parts,
            block,
            region,
            shape,
            grid,
            plan,
            ROWS,
        )
    if PHASE == "all":
        tl.debug_barrier()
    if PHASE == "all" or PHASE == "small":
        # The programs of a group divide the positions; each computes all of the small gradients.
        for k in range(number):
            _small_gradients(
                moments, w3, b3, gamma, beta, mixing, dlogit_parts, product_parts, shares, n + k, shape, grid, plan
            )
        tl.debug_barrier()
        of_program = (positions + plan.positions - 1) // plan.positions
        of_program = (of_program + tl.num_programs(1) - 1) // tl.num_programs(1) * plan.positions
        first_position = tl.program_id(1) * of_program
        last_position = tl.minimum(first_position + of_program, positions)
        for k in range(number):
            share = (n + k) * tl.num_programs(1) + tl.program_id(1)
            _means_gradient(
                means,
                gates,
                w1,
                mixing,
                sum_parts,
                dmeans,
                position_shares,
                n + k,
                share,
                first_position,
                last_position,
                shape,
                grid,
                plan,
            )
    if PHASE == "all":
        tl.debug_barrier()
    if PHASE == "all" or PHASE == "input":
        _input_gradient(x, dy, dx, gates, moments, mixing, weights, dlogits, dmeans, block, region, shape, plan, ROWS)


# -------------------------------------------------------------------------------------------- sums over the groups


@_jit
def _sum_w3(mixing, dw3, c0, tap, number, height, width, plan: tl.constexpr):
    """Sum the gradient of one tap of ``w3`` over the groups, for a block of input channels."""
    OUTPUTS: tl.constexpr = plan.outputs
    INPUTS: tl.constexpr = plan.inputs
    acc: tl.constexpr = dw3.dtype.element_ty
    area = tl.cast(height, acc) * tl.cast(width, acc)
    planes = tl.cast(number, tl.int64) * plan.width
    o = tl.arange(0, plan.outputs)[:, None]
    c = c0 + tl.arange(0, plan.inputs)[:, None]
    dweight = tl.zeros((OUTPUTS, INPUTS), acc)
    for n0 in range(0, number, plan.positions):
        n = (n0 + tl.arange(0, plan.positions)).to(tl.int64)[None, :]
        mask = (o < plan.width) & (n < number)
        of_outputs = mixing + n * plan.width + o
        a1 = tl.load(of_outputs + _A1 * planes, mask=mask, other=0.0)
        dm2 = tl.load(of_outputs + _DM2 * planes, mask=mask, other=0.0) / area
        mask_c = (c < plan.width) & (n < number)
        of_inputs = mixing + tap * planes + n * plan.width + c
        dkernel = tl.load(of_inputs + _DKERNEL * planes, mask=mask_c, other=0.0)
        shifted = tl.load(of_inputs + _SHIFTED * planes, mask=mask_c, other=0.0)
        dweight += tl.sum(a1[:, None, :] * dkernel[None, :, :] + dm2[:, None, :] * shifted[None, :, :], axis=2)
    c = c0 + tl.arange(0, plan.inputs)[None, :]
    tl.store(dw3 + _tap_offsets(o, c, tap, plan), dweight, mask=(o < plan.width) & (c < plan.width))


@_jit
def _sum_rows(matrix, columns, rows, first, last, acc: tl.constexpr, BLOCK: tl.constexpr):
    """Sum entries ``first`` to ``last`` of the rows of a matrix; return their indices and sums, [BLOCK] each."""
    entry = first + tl.arange(0, BLOCK)
    total = tl.zeros((64, BLOCK), acc)
    for row in range(0, rows, 64):
        n = (row + tl.arange(0, 64)).to(tl.int64)[:, None]
        total += tl.load(matrix + n * columns + entry[None, :], mask=(n < rows) & (entry < last)[None, :], other=0.0)
    return entry, tl.sum(total, axis=0)


@_jit
def _sum_beta(shares, beta, dbeta, number, plan: tl.constexpr):
    """Sum the gradient of ``beta``, which is also the logit of a1 in the static variant."""
    OUTPUTS: tl.constexpr = plan.outputs
    acc: tl.constexpr = dbeta.dtype.element_ty
    o = tl.arange(0, plan.outputs)
    direct = tl.zeros((16, OUTPUTS), acc)
    da1 = tl.zeros((16, OUTPUTS), acc)
    for n0 in range(0, number, 16):
        n = (n0 + tl.arange(0, 16)).to(tl.int64)[:, None]
        mask = (n < number) & (o < plan.width)[None, :]
        pointers = shares + (n * 4 + 2) * plan.width + o[None, :]
        direct += tl.load(pointers, mask=mask, other=0.0)
        da1 += tl.load(pointers + plan.width, mask=mask, other=0.0)
    gradient = tl.sum(direct, axis=0)
    if not plan.dynamic:
        a1 = _softmax(tl.load(beta + o, mask=o < plan.width, other=0.0), o < plan.width)
        gradient += _softmax_backward(a1, tl.sum(da1, axis=0))
    tl.store(dbeta + o, gradient, mask=o < plan.width)


@_kernel
def parameters_kernel(
    beta,
    dw1,
    db1,
    dw3,
    db3,
    dgamma,
    dbeta,
    gates,
    mixing,
    weights,
    dlogits,
    dlogit_parts,
    sum_parts,
    product_parts,
    dmeans,
    shares,
    position_shares,
    number,
    position_parts,
    height,
    width,
    plan: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the parameters' gradients over the groups, from the scratch memory of ``backward_kernel``.

    The first programs take a tap and a block of input channels of ``w3`` each, the next ones a block of ``w1`` and
    ``b1`` or of ``b3`` and ``gamma``, whose shares are consecutive, the last one ``beta``.
    """
    acc: tl.constexpr = dw1.dtype.element_ty
    W1: tl.constexpr = plan.width * plan.width
    blocks_of_w3 = 9 * ((plan.width + plan.inputs - 1) // plan.inputs)
    blocks_of_w1 = (W1 + plan.width + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    if program < blocks_of_w3:
        _sum_w3(mixing, dw3, program // 9 * plan.inputs, program % 9, number, height, width, plan)
    elif program < blocks_of_w3 + blocks_of_w1:
        first = (program - blocks_of_w3) * BLOCK
        rows = number * position_parts
        entry, gradient = _sum_rows(position_shares, W1 + plan.width, rows, first, W1 + plan.width, acc, BLOCK)
        tl.store(dw1 + entry, gradient, mask=entry < W1)
        tl.store(db1 + entry - W1, gradient, mask=(entry >= W1) & (entry < W1 + plan.width))
    elif program < tl.num_programs(0) - 1:
        first = (program - blocks_of_w3 - blocks_of_w1) * BLOCK
        entry, gradient = _sum_rows(shares, 4 * plan.width, number, first, 2 * plan.width, acc, BLOCK)
        tl.store(db3 + entry, gradient, mask=entry < plan.width)
        tl.store(dgamma + entry - plan.width, gradient, mask=(entry >= plan.width) & (entry < 2 * plan.width))
    else:
        _sum_beta(shares, beta, dbeta, number, plan)


@_kernel
def empty_kernel():
    """Do nothing: whether it can be launched shows whether any kernel can."""

"""Matrix kernels: one tile of 16 weight rows times any number of tokens.

`tile_<format>(weights, columns, x, x_stride, num_tokens, sums, scratch)` writes float32
`sums[token][16]`. One token reads the packed weights directly. For several each group is unpacked
into `scratch` (bytes and float32 scales), or stays where it is if its codes are bytes, and serves
every token before the next one, so that the weights stream without a pause; many tokens unpack
2,048 columns at a time.
Either way a token's sum runs over the groups in order:

    sum = fma(scale * x_scale, float(dot), sum);  sum = fma(minimum, x_scaled_sum, sum)

or, where minima are of 16 columns, `fma(minimum * x_scale, float(-8 * sub_minima * x_sums), sum)`;
so its bits do not depend on how many tokens come with it.

`row_<format>(weights, columns, row, out, scratch)` writes one row of a tile as float32: an
embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from llvmlite import ir

from cyclewise.machine.kernels.bfloat_matmul import BfloatMatmul
from cyclewise.machine.kernels.blocks import (
    BLOCK_FORMATS,
    FLOAT_FORMATS,
    ROWS,
    STEPS,
    BlockFormat,
)
from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.dot import (
    ACTIVATION_GROUP,
    AT_HALF_SUMS,
    AT_SCALE,
    AT_SCALED_SUM,
    QUAD,
    ActivationLayout,
    SubScale,
)
from cyclewise.machine.kernels.dots import make_dot
from cyclewise.machine.kernels.float_matmul import FloatMatmul
from cyclewise.machine.kernels.lang import F32, I8, I16, I32, Emitter, Value, Variable, vector

UNPACK_FROM = 32
"""Tokens from which many groups are unpacked before the first is multiplied."""
FEW_AHEAD = 4096
"""How far ahead a stream of weights that meet several tokens is asked for, in bytes."""
PANEL_GROUPS = 64
"""Groups that are unpacked at once. They are more than a first-level cache holds, but tokens that
are read for longer without a jump come faster from behind the second.
"""
SCRATCH_BYTES = PANEL_GROUPS * (STEPS + 5) * 4 * ROWS

_Scales = tuple[Value, Value | None, Value | None]
"""Of a group and a part: the scale, the minimum and the minima of 16 columns, where there are."""


def matmul_unit(name: str, tiles: tuple[int, ...] | None = None) -> Unit:
    """The unit of one weight format: it exports `tile_<format>` and `row_<format>`.

    `tiles`: how many tokens meet unpacked weights of a quantized format at once, largest first,
    where the target's own are not wanted; they change the speed and no bit of the results.
    """
    exports = (f"tile_{name}", f"row_{name}")
    if name in FLOAT_FORMATS:

        def write(emitter: Emitter) -> None:
            as_bfloat = name == "BF16" and emitter.target.has_bf16
            (BfloatMatmul if as_bfloat else FloatMatmul)(name).write(emitter)

        return Unit(f"matmul_{name}", write, exports)
    variant = "".join(f"_{tile}" for tile in tiles or ())
    return Unit(f"matmul_{name}{variant}", _BlockMatmul(name, tiles).write, exports)


class _BlockMatmul:
    """Writes the unit of a quantized format."""

    def __init__(self, name: str, tiles: tuple[int, ...] | None) -> None:
        self.kind: BlockFormat = BLOCK_FORMATS[name]
        self.tiles = tiles

    def write(self, emitter: Emitter) -> None:
        kind, target = self.kind, emitter.target
        tiles = self.tiles or target.token_tiles
        self.emitter, self.lanes, self.parts = emitter, target.lanes, ROWS // target.lanes
        self.dot = make_dot(emitter, kind)
        # Where a tile has two parts, three tokens fit into the registers as well as four.
        sizes = {*target.token_tiles, *((3,) if self.parts == 2 else ())}
        self._few_tiles = tuple(sorted((size for size in sizes if size <= 8), reverse=True))
        direct = emitter.function("direct", 6, self._direct, exported=False)
        panel = {
            tile: emitter.function(
                f"panel_{tile}", 6, lambda *a, tile=tile: self._panel(tile, *a), exported=False
            )
            for tile in tiles
        }
        unpack = emitter.function("unpack", 3, self._unpack, exported=False)
        unpack_row = unpack
        if not kind.has_own_zero_point:
            as_packed = partial(self._unpack, centred=False)
            unpack_row = emitter.function("unpack_row", 3, as_packed, exported=False)
        few = emitter.function("few", 6, self._few, exported=False)

        def tile(
            weights: Value,
            columns: Value,
            x: Value,
            _: Value,
            tokens: Value,
            sums: Value,
            scratch: Value,
        ) -> None:
            groups = columns >> 5
            layout = ActivationLayout(emitter, x, groups, tokens)

            def strides(count: int) -> tuple[Value, Value]:
                stride = layout.quad_stride if count >= QUAD else layout.token_stride
                return layout.group_stride, stride

            with emitter.when(tokens.equals(1)):
                emitter.call(direct, weights, groups, x, *strides(1), sums)
            with emitter.when(tokens > 1), emitter.range(0, tokens) as token:
                zero = emitter.constant(0.0, vector(F32, ROWS))
                emitter.store(sums + token * 64, zero)
            with emitter.when((tokens > 1) & (tokens < UNPACK_FROM)):
                emitter.call(few, weights, groups, x, tokens, sums, scratch)
            large = emitter.when(tokens >= UNPACK_FROM)
            with large, emitter.range(0, groups, PANEL_GROUPS) as first_group:
                rest = groups - first_group
                count = (rest < PANEL_GROUPS).select(rest, emitter.constant(PANEL_GROUPS))
                block = weights + (first_group // kind.groups_per_block) * kind.block_bytes
                emitter.call(unpack, block, count, scratch)

                def call_panel(size: int, first: Value) -> None:
                    at = layout.token(first) + first_group * layout.group_stride
                    to = sums + first * 64
                    emitter.call(panel[size], scratch, count, at, *strides(size), to)

                emitter.in_tiles(tokens, tiles, call_panel)

        def row(weights: Value, columns: Value, lane: Value, out: Value, scratch: Value) -> None:
            part, within = lane // self.lanes, lane % self.lanes
            per_block = kind.groups_per_block
            with emitter.range(0, (columns >> 5) // per_block) as block:
                at = weights + block * kind.block_bytes
                emitter.call(unpack_row, at, emitter.constant(per_block), scratch)
                with emitter.range(0, per_block) as group:
                    codes = scratch + group * self._panel_bytes + part * self._part_bytes
                    to = out + (block * per_block + group) * 128
                    self._row_group(codes, within, to)

        emitter.function(f"tile_{kind.name}", 7, tile)
        emitter.function(f"row_{kind.name}", 5, row)

    def _row_group(self, codes: Value, lane: Value, out: Value) -> None:
        """One lane of an unpacked group as 32 float32."""
        emitter, kind, width, quad = self.emitter, self.kind, self.lanes * 4, vector(F32, 4)
        at = codes + lane * 4
        scale = emitter.broadcast(at + STEPS * width, F32, 4)
        for step in range(STEPS):
            code = emitter.load(codes + self.dot.place(lane, step), vector(I8, 4))
            wide = emitter.cast(code, vector(I32, 4), "sext" if kind.bits == 8 else "zext")
            zero_point = kind.zero_point if kind.has_own_zero_point else 0
            value = emitter.cast(wide - zero_point, quad, "sitofp")
            if kind.has_sub_scales:
                many = self.dot.num_factors == 2
                place = (step // 4) * (width if many else 2)
                value = value * self._small(at + self._places["factor 0"] * width + place)
            value = value * scale
            if kind.has_minimum:
                minimum = emitter.broadcast(at + self._places["minimum"] * width, F32, 4)
                if kind.has_sub_minima:
                    place = self._places["sub_minima"] * width + 2 * (step // 4)
                    minimum = minimum * self._small(at + place) * -8.0
                value = value + minimum
            emitter.store(out + step * 16, value)

    def _small(self, address: Value) -> Value:
        """An int16 as four float32."""
        short = self.emitter.broadcast(address, I16, 4)
        return self.emitter.to_float(self.emitter.cast(short, vector(I32, 4), "sext"))

    def _factors(self, block: Value, index: Value | int) -> SubScale | None:
        """The sub-scales of a packed group, each read where it is first wanted."""
        if not self.kind.has_sub_scales:
            return None

        @cache
        def of_part(part: int) -> list[Value]:
            return self.dot.factors(self.kind.sub_scales(self.emitter, block, index, part))

        return lambda number, part: of_part(part)[number]

    def _added(
        self, total: Value, dot: Value, x: Value, scale: Value, minimum: Value | None,
        sub_minima: Value | None,
    ) -> Value:  # fmt: skip
        """A group's part in a token's sums; `x` is the address of the token's group."""
        emitter, lanes = self.emitter, self.lanes
        x_scale = emitter.broadcast(x + AT_SCALE, F32, lanes)
        value = emitter.fma(scale * x_scale, emitter.to_float(dot), total)
        if sub_minima is not None and minimum is not None:
            sums = self.dot.pair_sums(sub_minima, x + AT_HALF_SUMS)
            value = emitter.fma(minimum * x_scale, emitter.to_float(sums), value)
        elif minimum is not None:
            scaled_sum = emitter.broadcast(x + AT_SCALED_SUM, F32, lanes)
            value = emitter.fma(minimum, scaled_sum, value)
        return value

    @staticmethod
    def _tokens(
        tokens: int, x: Value, group: Value, group_stride: Value, stride: Value
    ) -> list[Value]:
        """Addresses of a group of each token of a tile; `stride` is from quad to quad, or token."""
        if tokens < QUAD:
            return [x + group * group_stride + stride * i for i in range(tokens)]
        at = x + group * (QUAD * ACTIVATION_GROUP)
        return [at + stride * (i // QUAD) + (i % QUAD) * ACTIVATION_GROUP for i in range(tokens)]

    def _direct(
        self, weights: Value, groups: Value, x: Value, group_stride: Value, stride: Value,
        out: Value,
    ) -> None:  # fmt: skip
        """One token: codes go from the stream into registers."""
        emitter, kind = self.emitter, self.kind
        zero = emitter.constant(0.0, vector(F32, self.lanes))
        sums = [emitter.variable(zero) for _ in range(self.parts)]

        def group(block: Value, index: Value | int, column_group: Value) -> None:
            at = self._tokens(1, x, column_group, group_stride, stride)
            factors = self._factors(block, index)
            dots = (
                []
                if kind.parts_in_turn
                else self.dot.group(
                    lambda step, part: kind.codes(emitter, block, index, step, part),
                    factors,
                    at,
                    self.parts,
                    True,
                )
            )
            for part, total in enumerate(sums):
                if kind.parts_in_turn:
                    if part:
                        emitter.keep_order()
                    dots += self.dot.group(
                        lambda step, _, part=part: kind.codes(emitter, block, index, step, part),
                        factors and (lambda number, _, part=part: factors(number, part)),
                        at,
                    )
                scales = self._packed_scales(block, index, part)
                total.set(self._added(total.get(), dots[part][0], at[0], *scales))

        self._over_groups(weights, groups, group, kind.prefetch_bytes)
        for part, total in enumerate(sums):
            emitter.store(out + part * self.lanes * 4, total.get())

    def _over_groups(
        self, weights: Value, groups: Value, write: Callable[[Value, Value | int, Value], None],
        ahead: int,
    ) -> None:  # fmt: skip
        emitter, kind = self.emitter, self.kind
        per_block = kind.groups_per_block
        group_bytes = kind.block_bytes // per_block
        with emitter.range(0, groups // per_block) as block:
            address = weights + block * kind.block_bytes
            if per_block == 1:
                self._prefetch(address + ahead, group_bytes)
                write(address, 0, block)
            else:
                with emitter.range(0, per_block) as index:
                    self._prefetch(address + index * group_bytes + ahead, group_bytes)
                    write(address, index, block * per_block + index)

    def _prefetch(self, address: Value, num_bytes: int) -> None:
        for offset in range(0, num_bytes, 64):
            self.emitter.prefetch(address + offset)

    @property
    def _places(self) -> dict[str, int]:
        """Where in an unpacked group, in vectors, the scales lie: behind the codes, float32 before
        int32.
        """
        kind, names = self.kind, ["scale"]
        if kind.has_minimum:
            names.append("minimum")
        if kind.has_sub_scales:
            names += [f"factor {number}" for number in range(self.dot.num_factors)]
        if kind.has_sub_minima:
            names.append("sub_minima")
        return {name: STEPS + place for place, name in enumerate(names)}

    @property
    def _panel_bytes(self) -> int:
        """Bytes of one unpacked group, its parts side by side."""
        return self.parts * self._part_bytes

    @property
    def _part_bytes(self) -> int:
        return (STEPS + len(self._places)) * self.lanes * 4

    def _packed_scales(
        self, block: Value, index: Value | int, part: int, *, centred: bool = True
    ) -> _Scales:
        emitter, kind = self.emitter, self.kind
        scale = kind.scale(emitter, block, index, part)
        minimum = kind.minimum(emitter, block, index, part) if kind.has_minimum else None
        if centred and minimum is not None:
            minimum = kind.centred_minimum(emitter, scale, minimum)
        minima = kind.sub_minima(emitter, block, index, part) if kind.has_sub_minima else None
        return scale, minimum, minima

    def _unpack(
        self, weights: Value, groups: Value, scratch: Value, *, centred: bool = True
    ) -> None:
        """Writes group after group, the parts of its rows side by side."""
        kind = self.kind

        def group(block: Value, index: Value | int, column_group: Value) -> None:
            to = scratch + column_group * self._panel_bytes
            self._unpack_group(block, index, to, centred=centred)

        self._over_groups(weights, groups, group, kind.prefetch_bytes)

    def _unpack_group(
        self, block: Value, index: Value | int, to: Value, *, centred: bool = True
    ) -> None:
        """`centred`: with the minimum that belongs to codes less the zero point."""
        emitter, kind, width = self.emitter, self.kind, self.lanes * 4
        for part in range(self.parts):
            codes = [kind.codes(emitter, block, index, step, part) for step in range(STEPS)]
            found = self.dot.arranged(codes)
            scale, minimum, _ = self._packed_scales(block, index, part, centred=centred)
            found += [scale] if minimum is None else [scale, minimum]
            if kind.has_sub_scales:
                pairs = kind.sub_scales(emitter, block, index, part)
                found += self.dot.factors(pairs)
            if kind.has_sub_minima:
                found.append(kind.sub_minima(emitter, block, index, part))
            for i, value in enumerate(found):
                emitter.store(to + part * self._part_bytes + i * width, value)

    def _few(
        self, weights: Value, groups: Value, x: Value, tokens: Value, sums: Value, scratch: Value
    ) -> None:
        """Group after group, each unpacked once for all tokens: the stream never waits for them."""
        emitter, kind = self.emitter, self.kind
        in_place = kind.codes_are_bytes and not self.dot.rearranges
        layout = ActivationLayout(emitter, x, groups, tokens)

        def group(block: Value, index: Value | int, column_group: Value) -> None:
            if not in_place:
                self._unpack_group(block, index, scratch)

            def call(size: int, first: Value) -> None:
                stride = layout.quad_stride if size >= QUAD else layout.token_stride
                x_at = layout.token(first) + column_group * layout.group_stride
                at = self._tokens(size, x_at, emitter.constant(0), layout.group_stride, stride)
                places = [sums + first * 64 + i * 64 for i in range(size)]
                if not in_place:
                    self._panel_group(scratch, at, places)
                    return
                dots = self.dot.group(
                    lambda step, part: kind.codes(emitter, block, index, step, part),
                    None,
                    at,
                    self.parts,
                )
                scales = [self._packed_scales(block, index, part) for part in range(self.parts)]
                self._add_group(dots, scales, at, places)

            emitter.in_tiles(tokens, self._few_tiles, call)

        self._over_groups(weights, groups, group, FEW_AHEAD)

    def _panel(
        self, tokens: int, codes: Value, groups: Value, x: Value, group_stride: Value,
        stride: Value, out: Value,
    ) -> None:  # fmt: skip
        """Where a tile has several parts, registers hold int16 sums of all of them, and the
        float32 sums stay in memory.
        """
        emitter, floats = self.emitter, vector(F32, self.lanes)
        places = [out + i * 64 for i in range(tokens)]
        in_registers = self.parts == 1
        sums = [emitter.variable(emitter.load(to, floats)) for to in places if in_registers]
        with emitter.range(0, groups) as group:
            at = self._tokens(tokens, x, group, group_stride, stride)
            self._panel_group(codes + group * self._panel_bytes, at, places, sums)
        for total, to in zip(sums, places, strict=False):
            emitter.store(to, total.get())

    def _panel_group(
        self, codes: Value, at: list[Value], places: list[Value], sums: Sequence[Variable] = ()
    ) -> None:
        """An unpacked group times tokens, onto their sums: those in registers, or in memory."""
        emitter, kind, width = self.emitter, self.kind, self.lanes * 4
        floats, words = vector(F32, self.lanes), vector(I32, self.lanes)

        def load(part: int, index: int, type_: ir.Type) -> Value:
            return emitter.load(codes + part * self._part_bytes + index * width, type_)

        def factor(number: int, part: int) -> Value:
            return load(part, self._places[f"factor {number}"], words)

        dots = self.dot.unpacked_group(
            lambda step, part: load(part, step, words),
            factor if kind.has_sub_scales else None,
            at,
            self.parts,
        )
        scales: list[_Scales] = []
        for part in range(self.parts):
            scale = load(part, self._places["scale"], floats)
            minimum = load(part, self._places["minimum"], floats) if kind.has_minimum else None
            minima = load(part, self._places["sub_minima"], words) if kind.has_sub_minima else None
            scales.append((scale, minimum, minima))
        self._add_group(dots, scales, at, places, sums)

    def _add_group(
        self, dots: list[list[Value]], scales: list[_Scales], at: list[Value],
        places: list[Value], sums: Sequence[Variable] = (),
    ) -> None:  # fmt: skip
        """A group's dot products, for each part one a token, onto the tokens' sums."""
        emitter, width, floats = self.emitter, self.lanes * 4, vector(F32, self.lanes)
        for i, place in enumerate(places):
            # Nothing is stored between a token's parts, so that its own scale is loaded once.
            found = []
            for part, of_part in enumerate(scales):
                total = sums[i].get() if sums else emitter.load(place + part * width, floats)
                found.append(self._added(total, dots[part][i], at[i], *of_part))
            for part, value in enumerate(found):
                if sums:
                    sums[i].set(value)
                else:
                    emitter.store(place + part * width, value)

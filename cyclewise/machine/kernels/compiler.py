"""From what an `Emitter` wrote to machine code, kept on disk.

A *unit* is one LLVM module: a function `write(emitter)` and the names that it exports. Its object
code is kept under a key made of the sources of this folder, the LLVM version and the processor,
so that an edited kernel is never met by its old code. Compiling happens in the order of need; the
first time it is announced on standard error.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from llvmlite import binding

from cyclewise.machine.kernels.lang import Emitter
from cyclewise.machine.kernels.target import Target, host_target
from cyclewise.paths import cache_dir, open_own


@dataclass(frozen=True)
class Unit:
    """One compiled module: `write(emitter)` emits the functions that `exports` names."""

    name: str
    write: Callable[[Emitter], None]
    exports: tuple[str, ...]


@cache
def _initialize(native: bool) -> None:
    if native:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    else:
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()


@cache
def kernels_hash() -> str:
    """Of the sources of this folder: what they wrote or packed is of no use to others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _triple(target: Target) -> str:
    return target.triple or str(binding.get_default_triple())


def _target_machine(target: Target) -> Any:
    _initialize(native=not target.triple)
    # LLVM's options belong to the process, those of the last call hold, and one that it was not
    # built with would end the process.
    if target.is_x86:
        for option in ("enable-misched", "x86-machine-combiner"):
            binding.set_option("", f"-{option}={int(not target.keeps_order)}")
    return binding.Target.from_triple(_triple(target)).create_target_machine(
        cpu=target.cpu,
        features=target.features,
        opt=3,
        reloc="pic",
        codemodel="jitdefault",
        jit=True,
    )


def _optimized(unit: Unit, target: Target, machine: Any) -> Any:
    emitter = Emitter(unit.name, target)
    emitter.module.triple = _triple(target)
    emitter.module.data_layout = str(machine.target_data)
    unit.write(emitter)
    module = binding.parse_assembly(str(emitter.module))
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.slp_vectorization = False
    options.loop_vectorization = False
    options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def assembly(unit: Unit, target: Target) -> str:
    """The assembly of a unit, compiled afresh: for reading, and for the tests that look for
    instructions.
    """
    machine = _target_machine(target)
    return str(machine.emit_assembly(_optimized(unit, target, machine)))


def _compile(unit: Unit, target: Target) -> bytes:
    machine = _target_machine(target)
    return bytes(machine.emit_object(_optimized(unit, target, machine)))


class Compiler:
    """Compiles units for one target, or loads them from the cache; gives the addresses of their
    functions.
    """

    def __init__(self, target: Target | None = None) -> None:
        self.target = target or host_target()
        self._lock = Lock()
        self._engines: dict[str, Any] = {}
        self._addresses: dict[str, int] = {}
        self._announced = 0

    @property
    def key(self) -> str:
        """Changes with the kernels' sources, the LLVM version and the target."""
        versions = (kernels_hash(), binding.llvm_version_info, self.target)
        return hashlib.sha256(repr(versions).encode()).hexdigest()[:20]

    @property
    def _folder(self) -> Path:
        return cache_dir() / "kernels" / self.key

    def load(self, units: Iterable[Unit]) -> None:
        """Makes the functions of `units` callable; those met before cost nothing."""
        with self._lock:
            missing = [unit for unit in units if unit.name not in self._engines]
            objects = [(unit, self._read(unit)) for unit in missing]
            to_compile = [unit for unit, data in objects if data is None]
            for unit, data in objects:
                if data is None:
                    self._announce(len(to_compile))
                    data = _compile(unit, self.target)
                    self._write(unit, data)
                if unit.name not in self._engines:
                    self._link(unit, data)
            if to_compile and sys.stderr.isatty():
                sys.stderr.write("\r\x1b[K")
            self._announced = 0

    def address(self, name: str) -> int:
        """The address of an exported function of a loaded unit."""
        found = self._addresses.get(name)
        assert found, f"kernel {name} was not loaded"
        return found

    def _announce(self, total: int) -> None:
        self._announced += 1
        target = f"{self.target.cpu} ({self.target.name})"
        line = f"compiling kernels for {target}: {self._announced}/{total}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{line}")
        elif self._announced == 1:
            sys.stderr.write(f"compiling {total} kernels for {target} (once)\n")
        sys.stderr.flush()

    def _link(self, unit: Unit, data: bytes) -> None:
        # An engine of its own: of objects that are added to one later, LLVM takes the constants'
        # addresses from another object's offset table.
        empty = binding.parse_assembly(f'target triple = "{binding.get_default_triple()}"')
        engine = binding.create_mcjit_compiler(empty, _target_machine(self.target))
        engine.add_object_file(binding.ObjectFileRef.from_data(data))
        engine.finalize_object()
        self._engines[unit.name] = engine
        for name in unit.exports:
            self._addresses[name] = int(engine.get_function_address(name))

    def _read(self, unit: Unit) -> bytes | None:
        """The cached object code, unless it is missing, damaged or could be somebody else's."""
        try:
            descriptor = open_own(self._folder / f"{unit.name}.o")
            if descriptor is None:
                return None
            with open(descriptor, "rb") as file:
                data = file.read()
        except OSError:
            return None
        digest, code = data[:32], data[32:]
        return code if hashlib.sha256(code).digest() == digest else None

    def _write(self, unit: Unit, code: bytes) -> None:
        """Keeps object code for the next start; a cache that cannot be written costs only that."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(code).digest() + code)
                os.replace(temporary, self._folder / f"{unit.name}.o")
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError:
            return


@cache
def host_compiler() -> Compiler:
    """The compiler of this process: one, so that every model shares its kernels."""
    return Compiler()


def callable_at(address: int, num_arguments: int) -> Any:
    """A ctypes function of int64 arguments that releases the GIL while it runs."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * num_arguments)(address)

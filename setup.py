"""Builds csrc/ into the one native module, kvmem._core. Needs a C++17 compiler, setuptools and nanobind, nothing else.

Environment variables choose another flavour, each with its own object files:

    KVMEM_DEBUG=1                       -O1 -g, assertions, and the allocator checks itself after every call
    KVMEM_SANITIZE=address,undefined    any value of -fsanitize=; python must then be started with the runtime preloaded
    KVMEM_UNITS=0                       each source by itself, which is quicker when one has changed. The sources of a
                                        folder are one unit otherwise: two thirds of the time when all must be compiled

A level of optimisation in CFLAGS replaces the usual -O3 and link-time optimisation (CXXFLAGS in newer setuptools).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nanobind
import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")  # relative, as setuptools wants it: pip and build start this file in its own folder
NANOBIND = Path(nanobind.include_dir()).parent
DEBUG = os.environ.get("KVMEM_DEBUG", "0") not in ("", "0")
SANITIZE = os.environ.get("KVMEM_SANITIZE", "")
UNITS = os.environ.get("KVMEM_UNITS", "1") not in ("", "0")
APART = ("csrc/bindings/", "csrc/eviction/statistics.cpp")  # use names that another source of their folder has, too

compile_args = ["-std=c++17", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wextra"]
for part in ("include", "src", "ext/robin_map/include"):
    compile_args += ["-isystem", str(NANOBIND / part)]  # as a system header: its warnings are not ours
link_args = ["-ldl", "-pthread"]
if DEBUG or SANITIZE:
    # -g1: functions and lines, which a report of a sanitizer names; a fifth quicker than -g.
    compile_args += ["-O1", "-g1" if SANITIZE else "-g", "-fno-omit-frame-pointer", "-UNDEBUG"]
else:
    compile_args += ["-g0", "-DNDEBUG"]
    link_args += ["-Wl,-s"]  # strip: the symbol names of nanobind's templates would double the file
    own_level = "-O" in os.environ.get("CFLAGS", "") + os.environ.get("CXXFLAGS", "")  # before these, so -O3 would win
    clang = "clang" in os.environ.get("CC", "") + os.environ.get("CXX", "")  # which seldom comes with its linker plugin
    if not own_level:
        compile_args += ["-O3"]
    if not own_level and not clang:
        compile_args += ["-flto=auto"]  # a tenth fewer instructions, and no longer to build
        link_args += ["-O3", "-flto=auto", "-Wl,--version-script=csrc/exports.map"]
if DEBUG:
    compile_args += ["-DKVMEM_DEBUG"]
if SANITIZE:
    compile_args += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
    link_args += [f"-fsanitize={SANITIZE}"]


class BuildExt(build_ext):
    """Compiles the changed sources of the one extension side by side; setuptools would take all of them, one by one."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Objects of one flavour, or of one nanobind, must not be linked into another.
        flavour = "".join(
            f"-{word}" for word in (DEBUG and "debug", SANITIZE.replace(",", "-"), not UNITS and "apart") if word
        )
        self.build_temp += f"-nanobind{nanobind.__version__}{flavour}"
        if self.inplace:
            self.build_lib += flavour

    def build_extensions(self) -> None:
        compile_serially = self.compiler.compile

        def compile_all(sources, *, output_dir, depends, **options):
            def compile_one(source, members):
                (target,) = self.compiler.object_filenames([source], output_dir=output_dir)
                if not is_newer(target, [source, *members, *depends]):
                    compile_serially([source], output_dir=output_dir, depends=depends, **options)
                return target

            units = units_of(sources) if UNITS else {source: [] for source in sources}
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(compile_one, *zip(*units.items(), strict=True)))

        self.compiler.compile = compile_all
        super().build_extensions()


def is_newer(target, prerequisites) -> bool:
    return os.path.exists(target) and all(os.path.getmtime(p) < os.path.getmtime(target) for p in prerequisites)


def units_of(sources) -> dict[str, list[str]]:
    """What is compiled in place of the sources, with its members; a folder's unit includes all but those in APART."""
    units = {source: [source] for source in sources if source.startswith(APART)}
    for source in sources:
        if source not in units:
            unit = "build/units" / Path(source).parent.relative_to(CSRC).with_suffix(".cpp")
            units.setdefault(str(unit), []).append(source)
    for unit in (Path(unit) for unit in units if unit not in sources):
        text = "".join(f'#include "{Path(source).relative_to(CSRC).as_posix()}"\n' for source in units[str(unit)])
        if not unit.exists() or unit.read_text() != text:
            unit.parent.mkdir(parents=True, exist_ok=True)
            unit.write_text(text)
    return units


# setuptools 77 began to want the licence as an SPDX expression and to warn about the older field.
licence = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"

core = Extension(
    "kvmem._core",
    sources=sorted(map(str, CSRC.rglob("*.cpp"))),
    depends=["setup.py", *sorted(map(str, CSRC.rglob("*.h")))],
    include_dirs=[str(CSRC)],
    define_macros=[("NB_COMPACT_ASSERTIONS", None)],
    extra_compile_args=compile_args,
    extra_link_args=link_args,
    language="c++",
)

setup(ext_modules=[core], cmdclass={"build_ext": BuildExt}, **{licence: "Apache-2.0"})

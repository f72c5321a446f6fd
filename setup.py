"""Builds csrc/ into the one native module kvmem._core. No torch, no CUDA toolkit, no CMake: nanobind's own sources are
compiled beside ours."""

import os
from pathlib import Path

import nanobind
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
NANOBIND = Path(nanobind.source_dir()).parent


class BuildExt(build_ext):
    """Compiles the sources of the one extension in parallel; setuptools does so only across extensions."""

    def build_extensions(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        compile_one = self.compiler._compile

        def compile_all(sources, output_dir=None, macros=None, include_dirs=None, debug=0, extra_preargs=None,
                        extra_postargs=None, depends=None):
            macros, objects, extra_postargs, pp_opts, build = self.compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs)
            cc_args = self.compiler._get_cc_args(pp_opts, debug, extra_preargs)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [pool.submit(compile_one, o, *build[o], cc_args, extra_postargs, pp_opts)
                        for o in objects if o in build]
                for job in jobs:
                    job.result()
            return objects

        self.compiler.compile = compile_all
        super().build_extensions()


sources = sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").glob("*.cpp"))
core = Extension(
    "kvmem._core",
    sources=[*sources, str(NANOBIND / "src" / "nb_combined.cpp")],
    depends=sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").glob("*.h")),
    include_dirs=["csrc", str(NANOBIND / "include"), str(NANOBIND / "ext" / "robin_map" / "include")],
    define_macros=[("NB_COMPACT_ASSERTIONS", None)],
    extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wextra"],
    extra_link_args=["-ldl", "-pthread"],
    language="c++",
)

setup(ext_modules=[core], cmdclass={"build_ext": BuildExt})

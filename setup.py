"""Builds fastadv._C with CMake. Everything else about the package is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class CMakeBuild(build_ext):
    """One CMake project. A failed build is a warning: the package then runs on other backends."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        source, build = Path(__file__).parent.resolve(), Path(self.build_temp).resolve()
        configure = [
            "cmake",
            "-S",
            source,
            "-B",
            build,
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            "-UCMAKE_CUDA_COMPILER",  # what an earlier build did without may be there by now
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTADV_MODULE={target}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        try:
            try:
                self.build(configure, build)
            except subprocess.CalledProcessError:
                print("Once more without CUDA, whose compiler may be what failed")
                self.build([*configure, "-DCMAKE_CUDA_COMPILER="], build)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"fastadv._C was not built ({error})") from error

    @staticmethod
    def build(configure, build):
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(
    ext_modules=[Extension("fastadv._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)

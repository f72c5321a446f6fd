// nanobind's own sources, compiled into this module: no CMake, no second shared library.
#include <nb_combined.cpp>

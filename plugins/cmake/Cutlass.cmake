# The CUTLASS kernels: which tiles, and where the headers come from. Sets CUTLASS_SOURCES, for compute capability 9.0a.

set(ESPARSE_CUTLASS_TILES all CACHE STRING
  "CUTLASS tiles to build, about 70 s and 6 GiB of memory each: a list of names, all, or none")
set(ESPARSE_CUTLASS_INCLUDE_DIR "" CACHE PATH
  "Folder of CUTLASS's headers, 4.2 (default: those of the wheel nvidia-cutlass)")
set(CUTLASS_WHEEL nvidia-cutlass==4.2.0.0)

set(CUTLASS_ALL 128x64_streamk 128x128 256x128)  # kernels/cutlass_<tile>.cu
set(CUTLASS_TILES ${ESPARSE_CUTLASS_TILES})
if(CUTLASS_TILES STREQUAL "all")
  set(CUTLASS_TILES ${CUTLASS_ALL})
elseif(CUTLASS_TILES STREQUAL "none")
  set(CUTLASS_TILES "")
endif()

set(CUTLASS_SOURCES "")
set(CUTLASS_LIST "")
foreach(tile ${CUTLASS_TILES})
  if(NOT tile IN_LIST CUTLASS_ALL)
    message(FATAL_ERROR "esparse: ESPARSE_CUTLASS_TILES names ${tile}; there are ${CUTLASS_ALL}")
  endif()
  list(APPEND CUTLASS_SOURCES kernels/cutlass_${tile}.cu)
  string(APPEND CUTLASS_LIST "ESPARSE_CUTLASS_TILE(${tile})\n")
endforeach()
file(CONFIGURE OUTPUT cutlass/cutlass_tiles.inc CONTENT "${CUTLASS_LIST}")

# Headers: the folder named by the user, the installed wheel, or a wheel downloaded into the build folder.
function(esparse_find_cutlass out)
  if(ESPARSE_CUTLASS_INCLUDE_DIR)
    if(NOT EXISTS ${ESPARSE_CUTLASS_INCLUDE_DIR}/cutlass/cutlass.h)
      message(FATAL_ERROR "esparse: ESPARSE_CUTLASS_INCLUDE_DIR is ${ESPARSE_CUTLASS_INCLUDE_DIR}, "
        "which holds no cutlass/cutlass.h")
    endif()
    set(${out} ${ESPARSE_CUTLASS_INCLUDE_DIR} PARENT_SCOPE)
    return()
  endif()
  find_package(Python3 COMPONENTS Interpreter QUIET)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "from importlib.util import find_spec
spec = find_spec('cutlass_library')
print(spec.submodule_search_locations[0] if spec else '', end='')"
    OUTPUT_VARIABLE package ERROR_QUIET)
  if(NOT package)
    set(package ${CMAKE_BINARY_DIR}/cutlass_wheel/cutlass_library)
    esparse_unpack_wheel(${CUTLASS_WHEEL} ${CMAKE_BINARY_DIR}/cutlass_wheel)
  endif()
  if(NOT EXISTS ${package}/source/include/cutlass/cutlass.h)
    message(FATAL_ERROR "esparse: no CUTLASS headers: ${CUTLASS_WHEEL} is neither installed nor could it be "
      "downloaded. Set ESPARSE_CUTLASS_INCLUDE_DIR to CUTLASS's include folder, or ESPARSE_CUTLASS_TILES=none.")
  endif()
  set(${out} ${package}/source/include PARENT_SCOPE)
endfunction()

# Download a wheel with pip and unpack it into a folder, once. Callers check that what they want is there afterwards.
find_package(Python3 COMPONENTS Interpreter QUIET)

function(esparse_unpack_wheel requirement folder)
  if(EXISTS ${folder}/unpacked)
    return()
  endif()
  message(STATUS "esparse: downloading ${requirement} for its headers")
  file(REMOVE_RECURSE ${folder})
  execute_process(COMMAND ${Python3_EXECUTABLE} -m pip download --quiet --no-deps --dest ${folder} ${requirement}
    RESULT_VARIABLE failed ERROR_VARIABLE error)
  file(GLOB wheel ${folder}/*.whl)
  if(failed OR NOT wheel)
    message(WARNING "esparse: pip could not download ${requirement}:\n${error}")
    return()
  endif()
  file(ARCHIVE_EXTRACT INPUT ${wheel} DESTINATION ${folder})
  file(TOUCH ${folder}/unpacked)
endfunction()

#!/bin/sh
# A Triton server that runs on the CPU, out of the wheel of PyTriton, for test_tritonserver.py:
#
#   sh tests/deploy/install_tritonserver.sh /tmp/tritonserver
#   ESPARSE_TRITONSERVER=/tmp/tritonserver/tritonserver pytest tests/deploy/test_tritonserver.py
#
# It has the Python backend only. Needs python3 (3.9 to 3.13) with its shared library (Debian: libpython3.11),
# and about 300 MiB.
set -eu
python="${PYTHON:-/usr/bin/python3}"
mkdir -p "$1"
root=$(cd "$1" && pwd)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

"$python" -m venv "$root/venv"
# The Python backend of this server reads tensors through numpy 1's interface; numpy 2 would corrupt them.
"$root/venv/bin/pip" install --quiet 'numpy<2' onnxruntime tokenizers
"$root/venv/bin/pip" download --quiet --no-deps --dest "$root" nvidia-pytriton==0.7.0
"$python" -m zipfile -e "$root"/nvidia_pytriton-*.whl "$root/wheel"
server="$root/wheel/pytriton/tritonserver"
cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$server/backends/python/"
chmod +x "$server/bin/tritonserver" "$server/backends/python/triton_python_backend_stub"

cat > "$root/tritonserver" <<EOF
#!/bin/sh
# The backend starts the first python3 on PATH.
export PATH="$root/venv/bin:\$PATH" PYTHONPATH="$root/venv/lib/python$version/site-packages"
export LD_LIBRARY_PATH="$root/wheel/nvidia_pytriton.libs"
exec "$server/bin/tritonserver" --backend-directory="$server/backends" "\$@"
EOF
chmod +x "$root/tritonserver"
echo "$root/tritonserver"

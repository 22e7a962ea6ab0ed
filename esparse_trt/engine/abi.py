"""The structures and functions of plugins/include/esparse/sparse_gemm.h, as ctypes sees them."""

from __future__ import annotations

import ctypes


class Gemm(ctypes.Structure):
    """`esparse_gemm`: a problem."""

    _fields_ = [
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("permutation", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]


class Gpu(ctypes.Structure):
    """`esparse_gpu`: what a candidate may depend on."""

    _fields_ = [("capability", ctypes.c_int32), ("multiprocessors", ctypes.c_int32)]


class Launch(ctypes.Structure):
    """`esparse_launch`: where and how a problem is enqueued."""

    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("programmatic", ctypes.c_int32),
    ]


class Message(ctypes.Structure):
    """`esparse_message`: why a call failed."""

    _fields_ = [("text", ctypes.c_char * 256)]


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The signatures of the C ABI.

    Raises:
        AttributeError: the library lacks a function.
    """
    gemm, gpu, message = (ctypes.POINTER(kind) for kind in (Gemm, Gpu, Message))
    number = ctypes.c_int32
    signatures: dict[str, tuple[object, list[object]]] = {
        "esparse_metadata_words": (ctypes.c_int64, [ctypes.c_int64, ctypes.c_int64]),
        "esparse_check": (ctypes.c_int, [gemm, message]),
        "esparse_candidate_count": (number, []),
        "esparse_candidate_name": (ctypes.c_char_p, [number]),
        "esparse_version": (ctypes.c_char_p, []),
        "esparse_kernel_set": (ctypes.c_char_p, []),
        "esparse_current_gpu": (ctypes.c_int, [gpu, message]),
        "esparse_supports": (ctypes.c_int, [gemm, gpu, number, message]),
        "esparse_default_candidate": (number, [gemm, gpu]),
        "esparse_workspace_bytes": (ctypes.c_size_t, [gemm, number]),
        "esparse_gemm_run": (ctypes.c_int, [gemm, number, ctypes.POINTER(Launch), message]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib

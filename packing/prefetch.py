"""A hint to the processor, for kernels that write to, or read from, hundreds of places in turn."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def prefetch(typing_context, array, index):
    """Begin to load array[index] into the cache, and do not wait for it; an index outside the array does no harm.

    Hardware follows some 50 streams. A counting sort has one per length, and waits for memory at the end of each cache
    line (8 ns a value for 500 streams, 2.5 ns if each line is asked for one line ahead).
    """

    def emit(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch", (byte,), ir.FunctionType(ir.VoidType(), (byte, number, number, number))
        )
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        # to write to; keep in all caches; data, not instructions
        builder.call(hint, (address, number(1), number(3), number(1)))
        return context.get_dummy_value()

    return types.none(array, index), emit

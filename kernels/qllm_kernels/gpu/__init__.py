"""Triton kernels, one file per operation. Imported by `qllm_kernels.dispatch` only, so that CPU users never load triton.

Names: `b_` values of a program, `p_` pointers, `o_` offsets, `m_` masks, `i_` program ids; compile-time constants
are uppercase.
"""

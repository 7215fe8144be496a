"""Flags that several conversions share: the dtype of what is written, and numbers that are not finite.

A parser gets `dtype`, a name of torch's or None for weights as they are stored, and `allow_non_finite`.
"""

from openchatkit import cli

DTYPES = ("float32", "float16", "bfloat16")


def add_dtype_flags(parser: cli.Parser) -> None:
    """Add --dtype, of conversions to layer shards, and --allow-non-finite."""
    parser.add_argument("--dtype", choices=DTYPES, help="convert the weights (not given: as they are stored)")
    _add_finite_flag(parser)


def add_half_flags(parser: cli.Parser) -> None:
    """Add --fp16 and --bf16, of conversions to other people's formats, and --allow-non-finite."""
    dtype = parser.add_mutually_exclusive_group()
    for flag, name in (("--fp16", "float16"), ("--bf16", "bfloat16")):
        help_text = f"convert to {name} (not given: as stored)"
        dtype.add_argument(flag, dest="dtype", action="store_const", const=name, help=help_text)
    _add_finite_flag(parser)


def _add_finite_flag(parser: cli.Parser) -> None:
    parser.add_argument("--allow-non-finite", action="store_true", help="convert NaN and infinite weights, too")

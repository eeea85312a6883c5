"""The studies: one question about products with Jacobians each, measured, in a table and a picture.

To add one, write a file here that tells the mathematics in its docstring, with shapes, and ends in

    STUDY = Study(
        name="my-study",                      # python scripts/benchmark.py my-study [--quick] [--out DIR] [--parts A]
        question="A or B?",                   # one line, for --help and above the table
        parts={"a": measure_a, "b": measure_b},  # each (Scope) -> rows; may be run one by one, their rows are kept
        table=table,                          # (rows) -> Markdown
        draw=draw,                            # (path, rows) -> None, writes the PNG
    )

and name it in `STUDIES`. A part builds the tensors of one size, lists the ways to compute the answer, and yields from

    scope.compare({"n": 256}, [Form("direct", prepare, needed=bytes), Form("indirect", prepare_other)], truth)

where `prepare()` does what is not on the clock and returns the call that is, and `truth()` gives the answer in float64
on the CPU. `compare` times the forms in turns (medians, quartiles), counts the peak memory of a call, holds every
answer against the truth, and reports a form that needs more bytes than there is room for without trying it. The job
saves results.json (`rows`, `max_error`, `environment`), table.md and NAME.png, and saves the rows after every part.
"""

from experiments.studies import (
    contraction_order,
    fisher_product,
    flow_likelihood,
    input_jacobian,
    jacobian_gram,
    matmul_vjp,
)
from experiments.studies.base import Study

_ALL: tuple[Study, ...] = (
    matmul_vjp.STUDY,
    input_jacobian.STUDY,
    fisher_product.STUDY,
    jacobian_gram.STUDY,
    contraction_order.STUDY,
    flow_likelihood.STUDY,
)
STUDIES: dict[str, Study] = {study.name: study for study in _ALL}

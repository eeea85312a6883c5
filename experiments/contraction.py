"""In which order to multiply a chain of matrices, counted before anything is multiplied."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """The cheapest way to multiply a chain.

    Attributes:
        words: With parentheses, as in "A(BC)".
        flops: Additions and multiplications.
        multiply_adds: Multiplications.
    """

    words: str
    flops: int
    multiply_adds: int


def cheapest_order(shapes: Sequence[tuple[int, int]]) -> Order:
    """Find the order in which a product of matrices takes the fewest multiplications, by opt_einsum.

    Args:
        shapes: (rows, columns) of two to twenty-six matrices, each with as many rows as the last has columns.

    Returns:
        The order; matrices are named A, B, C, ...

    Raises:
        ValueError: If the shapes form no chain.
        ImportError: If opt_einsum is not installed.
    """
    import opt_einsum

    shapes = [(rows, columns) for rows, columns in shapes]
    if not 2 <= len(shapes) <= 26:
        raise ValueError(f"{len(shapes)} matrices are no chain that can be named: give 2 to 26 shapes")
    for number, ((_, columns), (rows, _)) in enumerate(zip(shapes, shapes[1:], strict=False)):
        if columns != rows:
            left, right = chr(65 + number), chr(66 + number)
            raise ValueError(f"{left} has {columns} columns and {right} has {rows} rows: no product {left}{right}")
    letters = [opt_einsum.get_symbol(i) for i in range(len(shapes) + 1)]
    terms = ",".join(a + b for a, b in zip(letters, letters[1:], strict=False))
    # "optimal" tries all orders; dynamic programming finds the same for long chains
    how = "optimal" if len(shapes) <= 8 else "dp"
    expression = f"{terms}->{letters[0]}{letters[-1]}"
    path, _ = opt_einsum.contract_path(expression, *shapes, shapes=True, optimize=how)
    return _follow(path, shapes)


def count(order: str, shapes: Sequence[tuple[int, int]]) -> Order:
    """Count what a given order takes.

    Args:
        order: Letters A, B, C, ... in turn, with a pair of parentheses around each product but the last: "(AB)C".
        shapes: (rows, columns) of each matrix.

    Returns:
        The order with its counts.
    """
    stack: list[tuple[str, tuple[int, int]]] = []
    flops = adds = 0

    def multiply() -> None:
        nonlocal flops, adds
        (right, (inner, columns)), (left, (rows, _)) = stack.pop(), stack.pop()
        flops += rows * columns * (2 * inner - 1)
        adds += rows * columns * inner
        stack.append((f"({left}{right})", (rows, columns)))

    for letter in order:
        if letter == ")":
            multiply()
        elif letter != "(":
            stack.append((letter, shapes[ord(letter) - 65]))
    if len(stack) == 2:
        multiply()
    ((words, _),) = stack
    return Order(words[1:-1], flops, adds)


def _follow(path: Sequence[tuple[int, ...]], shapes: Sequence[tuple[int, int]]) -> Order:
    """Write opt_einsum's path, which removes operands and appends their product, with parentheses."""
    items = [(chr(65 + i), i) for i in range(len(shapes))]
    for pair in path:
        (left, first), (right, _) = sorted((items[i] for i in pair), key=lambda item: item[1])
        items = [item for i, item in enumerate(items) if i not in pair]
        items.append((f"({left}{right})", first))
    return count(items[0][0][1:-1], shapes)

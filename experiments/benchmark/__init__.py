"""The benchmark: HessianFree against tuned rivals at equal seconds, and the ablation of its own parts.

`suite` says what is compared, `tuning` finds each contender's settings, `measure` makes the runs, `store` keeps them,
`report` and `figures` show them, `ablation` is the table of HessianFree's variations, `job` ties all together.
"""

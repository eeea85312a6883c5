"""The price of one product G v: every back end of ours against every library that multiplies by Gauss-Newton matrices.

`workloads` says on what, `implementations` holds one file a library, `measuring` takes the times, errors and peaks,
`step` takes a whole optimizer step apart, `bars` holds the results against what was promised, `report` and `figure`
show them, `job` ties all together.
"""

"""A run -> one self-contained HTML page.

Numbers, pictures and page are apart: `curves`, `layers`, `predictions` and `latency` measure,
`figures` draws, `page` and `comparison` write HTML. What opens a run for them is
mecq_cli.workflow.report.
"""

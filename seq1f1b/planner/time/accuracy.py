"""How far off the predictions were where something was published to hold them against."""

ACCURACY = (
    "Held against published runs (docs/planner.md): ratios between settings within 8%, memory 3% "
    "off on average; absolute tokens/s were 0.8 to 1.2 times what was measured."
)

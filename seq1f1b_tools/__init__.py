"""The tools around training: data preprocessing, checkpoint conversion and the sweep."""

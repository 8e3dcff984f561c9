"""Drawing with matplotlib: lines, points, heads and the curves of training. Nothing here knows of studies."""

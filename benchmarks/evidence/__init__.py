"""Evidence: what conversion, calibration and training from scratch do to networks that can be trained in minutes.

``make evidence`` makes all of it: runs are logged one by one in ``runs/``, and one that is there is not made again.
"""

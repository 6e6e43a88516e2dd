"""How good generated pictures and videos are, from quantities made in the same run.

* `frechet`: distance between the Gaussians that fit two sets of features, with its interval
* `classifier`: a small image classifier trained in seconds; its features and its verdicts
* `video`: per-frame errors beside copying the last frame; a small clip network and its features

No published feature network is needed, so the numbers are for comparing rows of one table, made
by one network. They are not comparable with published FID or FVD.
"""

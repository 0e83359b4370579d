"""A recipe and a model's config enter; what the run will take, and how fast, leaves. No weights.

Order: cards (what is known of a GPU) -> simulate, training (bytes of a step) -> phases (bytes of
what comes before and after) -> traffic (bytes between GPUs) -> throughput -> scale (what several
GPUs gain), changes (what would make it fit) -> forecast, show.
"""

"""The demo's engine room: a trace of requests is served by two language models that share one pool.

    prompts     the built-in texts
    roles       loads the models: SmolLM2, a local checkpoint, or two small random ones
    workload    turns a trace into jobs, and says what memory they would need
    serve       serves the jobs with an engine for each model, as memory permits
    accounting  what other caches would hold; samples over time
    reference   a greedy step of transformers by itself
    check       every answer again with it, over a DynamicCache
    report      timeline as CSV, summary as JSON
    run         all of it, in order

Nothing here prints: `elastikv.cli` has the screens.
"""

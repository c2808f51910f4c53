"""The demo's engine room: a trace of requests is served by two language models that share one pool.

    prompts     the built-in texts
    roles       loads the models: SmolLM2, a local checkpoint, or two small random ones
    workload    turns a trace into jobs, and says what memory they would need
    decode      one greedy step of a model, with whatever cache
    scheduler   serves the jobs, round by round, as memory permits
    accounting  what other caches would hold; samples over time
    check       every answer again with transformers' DynamicCache
    report      timeline as CSV, summary as JSON
    run         all of it, in order

Nothing here prints: `elastikv.cli` has the screens.
"""

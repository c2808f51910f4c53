"""An HTTP server for one model, with OpenAI's completions route: `elastikv serve`, or `make_app` within another.

    models       transformers models by path, or with random weights
    text         tokens to text and back, also a token at a time
    completions  what a request may ask, and what an answer looks like
    app          the routes
    counters     an engine's counts for Prometheus

Needs starlette, and uvicorn to run by itself: pip install 'elastikv[serve]'.
"""

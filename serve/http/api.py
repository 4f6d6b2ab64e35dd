"""The ASGI application: routes, errors and what every request goes through, around one Gateway."""

from fastapi import FastAPI

from serve.http.errors import install_error_handlers
from serve.http.gateway import Gateway
from serve.http.middleware import Authentication, BodyLimit, RequestIds, RequestSpans
from serve.http.openapi import describe
from serve.http.routes import router


def create_api(gateway: Gateway) -> FastAPI:
    """The public API of a gateway; serves alone under any ASGI server, or as a Ray Serve ingress."""
    app = FastAPI(
        title="Pusa V1.0 video service",
        description="OpenAI's Videos API, served by Pusa; what that has no words for is under `pusa`.",
        version="1",
        redirect_slashes=False,
        # Their pages load scripts of strangers, and a browser cannot send the key they would need.
        docs_url=None,
        redoc_url=None,
    )
    app.state.gateway = gateway
    app.include_router(router)
    document = describe(app, gateway.model, gateway.config.uploads, gateway.config.require_keys)
    app.openapi = lambda: document  # type: ignore[method-assign]
    install_error_handlers(app)
    # The last one added is the first one a request meets.
    app.add_middleware(BodyLimit, max_bytes=gateway.config.uploads.max_body_bytes)
    app.add_middleware(Authentication, tenants=gateway.tenants)
    app.add_middleware(RequestIds, clock=gateway.clock, on_reject=gateway.measures.rejected)
    app.add_middleware(RequestSpans, traces=gateway.traces)
    return app

"""The server as an ASGI application: a worker, the routes of all its faces, and the guard before them."""

from collections.abc import Mapping

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from sd.app.web import a1111, about, api, openai, openapi, page, play
from sd.app.web.guard import Guard, Rules
from sd.app.web.http import ERROR_HANDLERS
from sd.app.web.worker import Worker

FACES = (api, about, openapi, a1111, openai, page, play)  # modules with ROUTES: rows of method, path and handler


def application(worker: Worker, rules: Rules | None = None, spellings: Mapping[str, str] | None = None) -> Starlette:
    """worker: started; spellings: further names of settings in jobs, -> ours"""
    routes = [Route(path, handler, methods=[method]) for face in FACES for method, path, handler in face.ROUTES]
    app = Starlette(routes=routes, middleware=[Middleware(Guard, rules or Rules())], exception_handlers=ERROR_HANDLERS)
    app.router.redirect_slashes = False
    app.state.worker, app.state.spellings = worker, dict(spellings or {})
    return app

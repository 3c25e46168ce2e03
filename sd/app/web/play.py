"""The live model at /play/: the folder that `sd play` makes, where it is there."""

import re

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from sd.app.jobs.playing import ready_folder
from sd.app.jobs.static_server import HEADERS, TYPES

CHAPTER = re.compile(r'<a href="\.\./course/[^"]*">(.*?)</a>')  # which are beside docs/play, but not on this server


async def slash(_: Request) -> Response:
    return RedirectResponse("play/")


async def file(request: Request) -> Response:
    folder, name = ready_folder(), request.path_params.get("name", "index.html")
    if folder is None:
        raise HTTPException(404, "the live model is not there yet. Make it with: sd play -o docs/play.")
    path = folder / name
    if path.parent != folder or not path.is_file():  # the folder holds no others
        raise HTTPException(404, "the live model has no such file.")
    if path.suffix == ".html":
        return HTMLResponse(CHAPTER.sub(r"\1", path.read_text("utf-8")), headers=HEADERS)
    return FileResponse(path, media_type=TYPES.get(path.suffix), headers=HEADERS)


ROUTES = (("GET", "/play", slash), ("GET", "/play/", file), ("GET", "/play/{name}", file))

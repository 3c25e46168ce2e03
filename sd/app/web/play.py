"""The live model at /play/: the folder that `sd play` makes, where it is there."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from sd.app.jobs.playing import ready_folder
from sd.app.jobs.static_server import HEADERS, TYPES


async def slash(_: Request) -> Response:
    return RedirectResponse("play/")


async def file(request: Request) -> Response:
    folder, name = ready_folder(), request.path_params.get("name", "index.html")
    if folder is None:
        raise HTTPException(404, "the live model is not there yet. Make it with: sd play -o docs/play.")
    path = folder / name
    if path.parent != folder or not path.is_file():  # the folder holds no others
        raise HTTPException(404, "the live model has no such file.")
    return FileResponse(path, media_type=TYPES.get(path.suffix), headers=HEADERS)


ROUTES = (("GET", "/play", slash), ("GET", "/play/", file), ("GET", "/play/{name}", file))

"""The page at /: one hand-written file, sent with a policy that lets no other script, style or server in."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse

FILE = Path(__file__).with_name("page.html")


@cache
def text_and_policy() -> tuple[str, str]:
    """The page, and its Content-Security-Policy: the script and the style by their hashes, pictures of its own."""
    text = FILE.read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"

    policy = {
        "default-src": "'none'",
        "script-src": allowed("script"),
        "style-src": allowed("style"),
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in policy.items())


async def page(_: Request) -> HTMLResponse:
    text, policy = text_and_policy()
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


ROUTES = (("GET", "/", page),)

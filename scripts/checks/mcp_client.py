"""Ask an MCP server, image-generation-mcp, for a picture from a server of ours: python mcp_client.py URL FOLDER

Runs in an environment of its own, in which image-generation-mcp is installed. Prints the JSON of what it says of the
finished picture, which lies in the folder.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from fastmcp import Client
from fastmcp.client.transports import StdioTransport

PREFIX = "IMAGE_GENERATION_MCP_"


async def main(url: str, folder: str) -> None:
    ours = {"SD_WEBUI_HOST": url, "SCRATCH_DIR": folder, "READ_ONLY": "false", "DEFAULT_PROVIDER": "sd_webui"}
    environment = {**os.environ, **{PREFIX + name: value for name, value in ours.items()}}
    command = str(Path(sys.executable).with_name("image-generation-mcp"))
    async with Client(StdioTransport(command, ["serve"], env=environment)) as client:
        providers = await call(client, "list_providers")
        (model,) = providers["providers"]["sd_webui"]["capabilities"]["models"]
        begun = await call(
            client, "generate_image", prompt="a red circle", provider="sd_webui", model=model["model_id"]
        )
        state = begun
        while state["status"] == "generating":
            await asyncio.sleep(0.5)
            state = await call(client, "check_generation_status", image_id=begun["image_id"])
    print(json.dumps({"model": model["model_id"], **state}))


async def call(client: Client, tool: str, **arguments: object) -> dict:
    result = await client.call_tool(tool, arguments)
    return json.loads(result.content[0].text)


asyncio.run(main(*sys.argv[1:]))

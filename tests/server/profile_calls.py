"""Calls to the routes of profiles, and what they answer."""

from __future__ import annotations

URL = "/v1/palette/profiles"
SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 8}


async def put(running, name, palette, **fields):
    return await running.client.put(f"{URL}/{name}", json={"palette": palette, **fields})


async def get(running, path=""):
    return await running.client.get(f"{URL}{path}")


async def report_of(running, **body):
    reply = await running.chat(seed=1, **body)
    assert reply.status_code == 200, reply.text
    return reply.json()["palette"]

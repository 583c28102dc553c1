"""``agentkd index`` and ``agentkd retriever``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkd.commands.console import Json, print_json, progress_bar
from agentkd.errors import ConfigError

if TYPE_CHECKING:
    from agentkd.retrieval.build import Built
    from agentkd.retrieval.manifest import IndexConfig, Manifest
    from agentkd.retrieval.staging import OnProgress

__all__ = ["register"]

DEFAULT_PORT = 8100

_INDEX_EXAMPLES = """Examples:

`agentkd index docs/ --out idx` (a folder of text, Markdown, HTML and PDF; run again, it does what changed)

`agentkd index passages.jsonl --out idx --kind hybrid` (words and vectors)

`agentkd index idx --query "Who founded Silver Harbor?"` (try a search)

`agentkd index more.jsonl --out idx --add`, `agentkd index idx --delete ID`, `agentkd index idx --verify`
"""


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("index", epilog=_INDEX_EXAMPLES)(index_command)
    app.command(
        "retriever",
        epilog="Examples:\n\n`agentkd retriever idx --port 8100`\n\n"
        "`curl http://127.0.0.1:8100/retrieve -H 'Content-Type: application/json' "
        '-d \'{"queries": ["Who founded Silver Harbor?"], "topk": 3, "return_scores": true}\'`',
    )(retriever_command)


def index_command(
    source: Annotated[
        str, typer.Argument(help='Folder, file (.jsonl, documents) or "hf:NAME"; or an index, to look at it.')
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the index.")] = None,
    kind: Annotated[
        str | None, typer.Option(help='"bm25" (default; needs no torch), "dense" or "hybrid".')
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help='Encoder of a dense or hybrid index: "minilm", a Hub name or a folder.')
    ] = None,
    query_prefix: Annotated[
        str | None, typer.Option(help="Before each query; the model's own by default.")
    ] = None,
    passage_prefix: Annotated[
        str | None, typer.Option(help="Before each passage; the model's own by default.")
    ] = None,
    ann: Annotated[
        str | None, typer.Option(help='"flat", "hnsw", "ivf", "ivf-sq8"; chosen by size by default.')
    ] = None,
    words: Annotated[int, typer.Option(min=8, help="Words of a passage, where documents are split.")] = 120,
    split: Annotated[
        bool | None, typer.Option("--split/--no-split", help="Split; by default all but JSON lines.")
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out documents that cannot be read.")
    ] = False,
    add: Annotated[
        bool, typer.Option("--add", help="Add to the index instead of matching the source.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Build anew over an index that is there.")
    ] = False,
    delete: Annotated[
        list[str] | None, typer.Option(help="Delete the passage with this id; repeatable.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its checksum.")] = False,
    query: Annotated[str | None, typer.Option("--query", "-q", help="Search the index and print.")] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Passages to print.")] = 3,
    rerank: Annotated[str | None, typer.Option(help="Cross-encoder that orders what --query found.")] = None,
    as_json: Json = False,
) -> None:
    """Index documents for the search tool; again on a changed source: only what changed is done."""
    if out is None:
        folder = _index_folder(source, look=bool(delete or verify or query))
        if delete:
            _delete(folder, delete, as_json)
        elif query is not None:
            _query(folder, query, k, rerank, as_json)
        else:
            _look(folder, verify, as_json)
        return
    if add and replace:
        raise ConfigError("--add and --replace exclude each other.")
    if delete or verify or query is not None:
        raise ConfigError(
            "--delete, --verify and --query look at a finished index.", f"Write: agentkd index {out} ..."
        )
    from agentkd.retrieval.corpus import Source, SourceConfig
    from agentkd.retrieval.manifest import IndexConfig

    reading = Source(source, SourceConfig(words=words, split=split, skip_unreadable=skip_unreadable))
    asked = {
        "kind": kind,
        "encoder": encoder,
        "query_prefix": query_prefix,
        "passage_prefix": passage_prefix,
        "ann": ann,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if encoder and not kind:
        given["kind"] = "hybrid"
    config = IndexConfig.model_validate(given)
    with _bar(as_json) as tell:
        built, done = _build(out, reading, config, given, add=add, replace=replace, tell=tell)
    _report(out, built, done, reading, as_json)


def _index_folder(source: str, *, look: bool) -> Path:
    from agentkd.retrieval.manifest import is_index

    folder = Path(source)
    if folder.is_dir() and is_index(folder):
        return folder
    if look:
        raise ConfigError(
            f"There is no index in {source}.", f"Make one by: agentkd index SOURCE --out {source}."
        )
    raise ConfigError("No --out was given.", f"Write: agentkd index {source} --out idx.")


def _build(
    out: Path,
    reading: Any,
    config: IndexConfig,
    given: dict[str, Any],
    *,
    add: bool,
    replace: bool,
    tell: OnProgress | None,
) -> tuple[Built, str]:
    """Build, add or bring up to date; and in a word which."""
    from agentkd.retrieval.build import IndexBuilder
    from agentkd.retrieval.manifest import read_manifest

    builder, source = IndexBuilder(out, on_progress=tell), reading.name
    if add:
        return builder.add(reading, source=source), "added"
    if replace or not (out / "manifest.json").is_file():
        return builder.build(reading, config, source=source, replace=replace), "built"
    old = read_manifest(out)
    if changed := sorted(name for name in given if getattr(old.config, name) != getattr(config, name)):
        raise ConfigError(
            f"{out} was built with another {', '.join(changed)}.",
            "Leave those options out, choose another --out, or pass --replace to build anew.",
        )
    sources = {segment.source for segment in old.segments}
    if sources != {source}:
        raise ConfigError(
            f"{out} holds an index of {', '.join(sorted(sources))}.",
            "Pass --add to add to it, --replace to build anew, or choose another --out.",
        )
    return builder.sync(reading, source=source), "updated"


def _report(out: Path, built: Built, done: str, reading: Any, as_json: bool) -> None:
    manifest = built.manifest
    figures = {
        "out": str(out),
        "done": done,
        "added": built.added,
        "deleted": built.deleted,
        "encoded": built.encoded,
        "skipped": reading.skipped,
        **_figures(manifest),
    }
    if as_json:
        print_json(figures)
        return
    for problem in reading.skipped:
        print(f"Skipped: {problem}", file=sys.stderr)
    if reading.ignored:
        print(f"{reading.ignored} files of other kinds were passed over.", file=sys.stderr)
    if done == "updated" and not built.added and not built.deleted:
        print(f"{out} is up to date: {manifest.passages:,} passages.")
    else:
        gone = f", {built.deleted:,} out" if built.deleted else ""
        print(f"{built.added:,} passages in{gone}; {_summary(manifest)}.")
    if manifest.ann:
        print(f"Vector index: {_choice(manifest)}.")
    print(f'Next: agentkd index {out} --query "..."   or   agentkd retriever {out}')


def _choice(manifest: Manifest) -> str:
    from agentkd.retrieval.ann import choose_kind

    if manifest.config.ann != "auto":
        return f"{manifest.ann}, as asked"
    return f"{manifest.ann}; {choose_kind(manifest.rows)[1]}"


def _figures(manifest: Manifest) -> dict[str, Any]:
    return {
        "kind": manifest.config.kind,
        "encoder": manifest.encoder.name if manifest.encoder else None,
        "ann": manifest.ann,
        "passages": manifest.passages,
        "bytes": manifest.bytes,
        "identity": manifest.identity,
    }


def _summary(manifest: Manifest) -> str:
    by = f"{manifest.config.kind}, {manifest.encoder.name}" if manifest.encoder else manifest.config.kind
    size = f"{manifest.bytes / 1e6:,.1f} MB" if manifest.bytes >= 1e6 else f"{manifest.bytes / 1e3:,.1f} kB"
    return f"the index has {manifest.passages:,} ({by}), {size}"


def _delete(folder: Path, ids: list[str], as_json: bool) -> None:
    from agentkd.retrieval.build import IndexBuilder

    with _bar(as_json) as tell:
        built = IndexBuilder(folder, on_progress=tell).delete(ids)
    if as_json:
        print_json({"deleted": built.deleted, **_figures(built.manifest)})
    else:
        print(f"{built.deleted} deleted; {_summary(built.manifest)}.")


def _look(folder: Path, verify: bool, as_json: bool) -> None:
    from agentkd.retrieval.manifest import read_manifest, verify_files

    manifest = read_manifest(folder)
    verify_files(folder, manifest, checksums=verify)
    sources = [segment.source for segment in manifest.segments]
    if as_json:
        print_json({**_figures(manifest), "sources": sources, "verified": verify})
        return
    print(f"{folder}: {_summary(manifest)}.")
    print(f"From: {', '.join(dict.fromkeys(sources))}")
    if manifest.ann:
        print(f"Vector index: {_choice(manifest)}.")
    if verify:
        print("Every file is as it was written.")


def _query(folder: Path, query: str, k: int, rerank: str | None, as_json: bool) -> None:
    from agentkd.retrieval.shown import visible
    from agentkd.retrieval.source import open_retriever

    hits = open_retriever(folder, rerank=rerank).search([query], k)[0]
    if as_json:
        rows = [{"score": hit.score, **hit.passage.model_dump()} for hit in hits]
        print_json({"query": query, "hits": rows})
        return
    if not hits:
        print("No passage found.")
    for number, hit in enumerate(hits, 1):
        print(f"{number}. {visible(hit.passage.title)}  ({visible(hit.passage.id)}, {hit.score:.3f})")
        print(f"   {visible(' '.join(hit.passage.text.split()))}")


@contextmanager
def _bar(quiet: bool) -> Iterator[OnProgress | None]:
    """A live line for each part of a build."""
    if quiet:
        yield None
        return
    with progress_bar() as bar:
        parts: dict[str, Any] = {}

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in parts:
                parts[what] = bar.add_task(what, total=total, note="")
            note = f"{done:,}" if total is None and done else ""
            bar.update(parts[what], completed=done, total=total, note=note)

        yield tell


def retriever_command(
    index: Annotated[str, typer.Argument(help="Folder of an index, or a JSON Lines file of passages.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = DEFAULT_PORT,
    k: Annotated[
        int, typer.Option("--k", "-k", min=1, max=1000, help="Passages where a request does not say.")
    ] = 3,
    token: Annotated[
        str | None,
        typer.Option(envvar="AGENTKD_RETRIEVER_TOKEN", help="Bearer token that clients must send."),
    ] = None,
    rerank: Annotated[str | None, typer.Option(help="Cross-encoder that orders what was found.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object once it listens.")] = False,
) -> None:
    """Serve an index over HTTP, in Search-R1's format (`POST /retrieve`), with `/health` and `/metrics`."""
    try:
        from agentkd.retrieval.server import retriever_app
        from agentkd.serve.server import serve_app
    except ImportError as exc:
        raise ConfigError(
            f"{exc.name} is not installed.", "Install what serving needs by: pip install 'agentkd[serve]'."
        ) from exc
    from agentkd.retrieval.source import open_retriever

    retriever: Any = open_retriever(index, rerank=rerank)
    if hasattr(retriever, "load"):
        retriever.load()  # the encoder, now rather than for the first request
    about: dict[str, Any] = {"index": Path(index).name}
    if hasattr(retriever, "manifest"):
        about |= {"kind": retriever.kind, "passages": len(retriever)}

    def say(address: str) -> None:
        if as_json:
            print(json.dumps({"url": f"{address}/retrieve", **about}), flush=True)
        else:
            print(f"Serving {index} at {address}/retrieve. Ctrl-C stops.", file=sys.stderr)
            if token is None and host not in ("127.0.0.1", "localhost", "::1"):
                print(
                    "Note: anyone who reaches this address can search; --token changes that.", file=sys.stderr
                )

    serve_app(retriever_app(retriever, topk=k, token=token, about=about), host=host, port=port, say=say)

"""`hibug2 schema`: the attributes and tags of a dataset, seen and changed by people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand

from hibug2.session import DatasetArgument, MaxCostOption, Session, verb, written

if TYPE_CHECKING:
    from hibug2.v1.types_pb2 import Schema

schema_app = typer.Typer(help="Attributes and tags of a dataset.", no_args_is_help=True)

SchemaArgument = Annotated[str, typer.Argument(metavar="SCHEMA", help="Id of a schema.")]

_EDITS = {
    "--add": ("[CATEGORY:]NAME=TAG,…", "A new attribute, of the main object where no category is said."),
    "--rename": ("OLD=NEW", "Another name for an attribute."),
    "--merge": ("NAME,…=NEW", "One attribute in place of several, with the tags of all."),
    "--drop": ("NAME", "An attribute less."),
    "--lock": ("NAME", "No edit and no new generation changes the attribute."),
    "--unlock": ("NAME", "It may be changed again."),
    "--add-tag": ("NAME:TAG,…", "New tags of an attribute."),
    "--rename-tag": ("NAME:OLD=NEW", "Another name for a tag."),
    "--merge-tags": ("NAME:TAG,…=NEW", "One tag in place of several."),
    "--drop-tag": ("NAME:TAG,…", "Tags less."),
}


class _InOrder(TyperCommand):
    """Numbers the edits: options of several names come grouped by name, and edits are done in their order."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        numbered, waiting = list(args), False
        for i, arg in enumerate(args):
            flag, equals, text = arg.partition("=")
            if waiting:
                numbered[i], waiting = f"{i} {arg}", False
            elif arg == "--":
                break
            elif flag in _EDITS and equals:
                numbered[i] = f"{flag}={i} {text}"
            else:
                waiting = arg in _EDITS
        return super().parse_args(ctx, numbered)


def _option(flag: str) -> Any:
    metavar, text = _EDITS[flag]
    return typer.Option(flag, metavar=metavar, help=text, show_default=False)


@verb(schema_app, "show")
def schema_show(session: Session, dataset: DatasetArgument, schema: SchemaArgument = "current") -> None:
    """Shows the attributes and tags of a dataset."""
    with session.client() as client:
        found = client.schema(dataset, schema)
        doubts = client.doubts(dataset, found.name)
    _tell(session, found, doubts)


@verb(schema_app, "list")
def schema_list(session: Session, dataset: DatasetArgument) -> None:
    """Lists the schemas that a dataset has or had."""
    from hibug2 import messages, show

    with session.client() as client:
        found = client.schemas(dataset)
        current = client.schema(dataset).name if found else ""
    if session.json:
        rows = [{"name": s.name, **messages.schema_to_json(s)} for s in found]
        session.document({"current": current, "schemas": rows})
    else:
        show.schemas(found, current, session.out)


@verb(schema_app, "edit", cls=_InOrder)
def schema_edit(
    session: Session,
    dataset: DatasetArgument,
    add: Annotated[list[str] | None, _option("--add")] = None,
    rename: Annotated[list[str] | None, _option("--rename")] = None,
    merge: Annotated[list[str] | None, _option("--merge")] = None,
    drop: Annotated[list[str] | None, _option("--drop")] = None,
    lock: Annotated[list[str] | None, _option("--lock")] = None,
    unlock: Annotated[list[str] | None, _option("--unlock")] = None,
    add_tag: Annotated[list[str] | None, _option("--add-tag")] = None,
    rename_tag: Annotated[list[str] | None, _option("--rename-tag")] = None,
    merge_tags: Annotated[list[str] | None, _option("--merge-tags")] = None,
    drop_tag: Annotated[list[str] | None, _option("--drop-tag")] = None,
) -> None:
    """Changes the schema of a dataset: in your editor (VISUAL or EDITOR), or by what is said here, in its order.

    Names with a comma stand in double quotes. The new schema is a schema of its own: results of the old one stay.
    """
    from hibug2 import schema_editor

    given = (add, rename, merge, drop, lock, unlock, add_tag, rename_tag, merge_tags, drop_tag)
    numbered = [
        (int(number), flag.removeprefix("--"), text)
        for flag, texts in zip(_EDITS, given, strict=True)
        for number, _, text in (text.partition(" ") for text in texts or ())
    ]
    edits = [(name, text) for _, name, text in sorted(numbered)]
    with session.client() as client:
        before = client.schema(dataset)
        after = (
            client.edit_schema(dataset, edits) if edits else schema_editor.edit(client, dataset, before, session.err)
        )
    if after.name == before.name:
        session.err.print(Text("Nothing has changed."))
    _tell(session, after)


@verb(schema_app, "generate")
def schema_generate(
    session: Session,
    dataset: DatasetArgument,
    model: Annotated[str, typer.Option("--model", help="Asks about what this model gets wrong.")] = "",
    attribute: Annotated[
        list[str] | None, typer.Option("--attribute", metavar="NAME", help="One that shall be in it; may be repeated.")
    ] = None,
    main_object: Annotated[
        list[str] | None, typer.Option("--main-object", metavar="CLASS", help="Where the dataset names no classes.")
    ] = None,
    pairs: Annotated[int | None, typer.Option("--pairs", help="Pairs of images to compare.")] = None,
    images: Annotated[int | None, typer.Option("--images", help="Images to look at for missing tags.")] = None,
    max_attributes: Annotated[int | None, typer.Option("--max-attributes")] = None,
    max_tags: Annotated[int | None, typer.Option("--max-tags")] = None,
    max_cost: MaxCostOption = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Makes a schema for a dataset; what is locked stays as it is."""
    from hibug2 import progress

    with session.client() as client, progress.of_job(session.err) as tell:
        made = client.generate_schema(
            dataset,
            model=model,
            attributes=attribute or (),
            main_objects=main_object or (),
            pair_count=pairs,
            image_count=images,
            max_attributes=max_attributes,
            max_tags=max_tags,
            seed=seed,
            max_cost=max_cost,
            on_progress=tell,
        )
    told = [f"{out.attribute}: merged into {out.into}: {out.reason}" for out in made.merged]
    told += [f"{out.attribute}: left out: {out.reason}" for out in made.dropped]
    for line in told:
        session.err.print(Text(line, "dim"), soft_wrap=True)
    _tell(session, made.schema)


@verb(schema_app, "import")
def schema_import(
    session: Session,
    dataset: DatasetArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML; JSON where its name ends in .json.")],
) -> None:
    """Stores a schema; the dataset's runs use it from now on.

    Names and tags are enough: a file "attributes: {object pose: [sitting, lying]}" can start a dataset.
    """
    with session.client() as client:
        stored = client.import_schema(dataset, file)
    _tell(session, stored)


@verb(schema_app, "export")
def schema_export(
    session: Session,
    dataset: DatasetArgument,
    schema: SchemaArgument = "current",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", show_default="stdout")] = None,
) -> None:
    """Writes a schema as YAML (JSON with --json, or to a FILE.json); `schema import` reads exactly it back."""
    from hibug2 import messages, schema_text

    with session.client() as client:
        found = client.schema(dataset, schema)
    document = messages.schema_to_json(found)
    if out is None and session.json:
        session.document(document)
    elif out is None:
        typer.echo(schema_text.to_yaml(document), nl=False)
    else:
        as_json = out.suffix.lower() == ".json"
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n" if as_json else schema_text.to_yaml(document)
        with written(out) as part:
            part.write_text(text, "utf-8")
        if session.json:
            session.document({"name": found.name, "out": str(out.absolute())})
        else:
            session.out.print(Text(f"{found.name} in {out}"), soft_wrap=True)


def _tell(session: Session, schema: Schema, doubts: dict[str, str] | None = None) -> None:
    from hibug2 import messages, show

    if session.json:
        told = {"doubts": doubts} if doubts else {}
        session.document({"name": schema.name, **messages.schema_to_json(schema), **told})
    else:
        show.schema(schema, session.out, doubts)

"""A checkpoint's chat template: a program that comes with it, run in jinja2's sandbox."""

import datetime
import json

import jinja2.ext
import jinja2.sandbox

from support.errors import DataError, read_json, read_text, require

MAX_TEMPLATE = 100_000  # characters that one may add to the question


class ChatTemplate:
    """The template of the folder `path`.

    config          of its tokenizer
    special_tokens  kind of token -> its text, which a template may print"""

    def __init__(self, path, config, special_tokens):
        self.path, self.special_tokens = path, special_tokens
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            undefined=Undefined,
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        source = read_template(path, config)
        try:
            self.template = environment.from_string(source)
        except Exception as error:  # jinja2's, or Python's on what jinja2 makes of it
            raise self._fault("is not valid", error) from error

    def render(self, content):
        """What a user says -> the chat as text, up to where the answer begins."""
        try:
            text = self.template.render(
                messages=[{"role": "user", "content": content}],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.special_tokens,
            )
        except Exception as error:  # a program raises anything
            raise self._fault("cannot be rendered", error) from error
        repeated = content.strip() in text and all(
            text.count(marker) == content.count(marker) for marker in ("<video>", "<audio>")
        )
        require(
            repeated and len(text) <= len(content) + MAX_TEMPLATE,
            f"{self.path}: its chat template should repeat {content!r} once and add no more than "
            f"{MAX_TEMPLATE} characters, gives {text[:300]!r}",
        )
        return text

    def _fault(self, what, error):
        return DataError(
            f"{self.path}: its chat template {what} ({type(error).__name__}: {error}); download it "
            "again"
        )


def read_template(path, config):
    """The template's text, where transformers looks for it; of several, the default one."""
    for name in ("additional_chat_templates/default.jinja", "chat_template.jinja"):
        if (path / name).is_file():
            return read_text(path / name)
    source = config.get("chat_template")
    if source is None:
        source = read_json(path / "chat_template.json", {}).get("chat_template")
    if isinstance(source, list):
        named = [e for e in source if isinstance(e, dict) and e.get("name") == "default"]
        source = named[-1].get("template") if named else None
    require(
        source and isinstance(source, str),
        f"{path}: has no chat template, in tokenizer_config.json, chat_template.jinja or "
        "chat_template.json",
    )
    return source


# --------------------------------------------------------------------------------------------------
# What templates expect of their surroundings, beside jinja2's own


class Undefined(jinja2.Undefined):
    """What the chat does not have may be asked about, as templates do, but not be printed."""

    __str__ = jinja2.Undefined._fail_with_undefined_error


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what is the assistant's; here just text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def raise_exception(message):
    raise jinja2.TemplateError(str(message))


def strftime_now(form):
    return datetime.datetime.now().strftime(form)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """jinja2's own writes < and > as \\u003c and \\u003e."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )

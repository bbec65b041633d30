"""`transhume user` and `transhume audit`: who may what, and who did what."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from pydantic import ValidationError

from transhume.cli.quantities import parse_time_s
from transhume.cli.session import JsonFlag, Session, say, say_json, session, words_of
from transhume.farm.rights import Grant, Role
from transhume.farm.users import IssuedToken, UserView
from transhume.model.errors import Refused

user_app = typer.Typer(name="user", help="Who may do what in the farm.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="The user's name.")]
RoleOption = Annotated[Role, typer.Option("--role", help="What the user may do.")]
OnOption = Annotated[str, typer.Option("--on", metavar="LABEL", help="Only on VMs with this label.")]
ExpiresOption = Annotated[str, typer.Option("--expires", help="How long the token is good: 12h, 90d.")]
KeepFlag = Annotated[bool, typer.Option("--keep", help="The older tokens stay good.")]


@user_app.command("add")
def add(
    context: typer.Context,
    name: NameArgument,
    role: RoleOption,
    on: OnOption = "",
    expires: ExpiresOption = "90d",
    as_json: JsonFlag = False,
) -> None:
    """Add a user and print its first token, this once."""
    current = session(context, as_json)
    grant, ttl_s = _grant(role, on), parse_time_s(expires)
    _tell_token(current, current.call(lambda client: client.users.add(name, grant, ttl_s)))


@user_app.command("token")
def token(
    context: typer.Context,
    name: NameArgument,
    expires: ExpiresOption = "90d",
    keep: KeepFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Print a new token for a user; the older ones open nothing any more."""
    current = session(context, as_json)
    ttl_s = parse_time_s(expires)
    _tell_token(current, current.call(lambda client: client.users.token(name, ttl_s, keep)))


@user_app.command("list")
def list_users(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List the users with what they may do."""
    current = session(context, as_json)
    found = current.call(lambda client: client.users.everybody())
    if current.as_json:
        say_json(list(found))
        return
    for user in found:
        say(f"{user.name}: {_grants_of(user)}; tokens: {len(user.tokens_expire_at_s)}")


@user_app.command("show")
def show(context: typer.Context, name: NameArgument, as_json: JsonFlag = False) -> None:
    """Show what a user may do, and until when its tokens are good."""
    current = session(context, as_json)
    user = current.call(lambda client: client.users.show(name))
    if current.as_json:
        say_json(user)
        return
    ends = [time.strftime("%Y-%m-%d %H:%M", time.localtime(each)) for each in user.tokens_expire_at_s]
    say(f"{user.name}: {_grants_of(user)}; tokens good until: {', '.join(ends) or 'it has none'}")


@user_app.command("remove")
def remove(context: typer.Context, name: NameArgument, as_json: JsonFlag = False) -> None:
    """Remove a user; its tokens open nothing from then on."""
    current = session(context, as_json)
    current.call(lambda client: client.users.remove(name))
    _tell_done(current, name, "was removed, with all tokens")


@user_app.command("grant")
def grant(
    context: typer.Context, name: NameArgument, role: RoleOption, on: OnOption = "", as_json: JsonFlag = False
) -> None:
    """Give a user a role, on the farm or on the VMs with a label."""
    current = session(context, as_json)
    wanted = _grant(role, on)
    current.call(lambda client: client.users.change_grant(name, wanted, revoke=False))
    _tell_done(current, name, f"is {role} on {on or 'the farm'}")


@user_app.command("revoke")
def revoke(
    context: typer.Context, name: NameArgument, role: RoleOption, on: OnOption = "", as_json: JsonFlag = False
) -> None:
    """Take a role back."""
    current = session(context, as_json)
    unwanted = _grant(role, on)
    current.call(lambda client: client.users.change_grant(name, unwanted, revoke=True))
    _tell_done(current, name, f"is no longer {role} on {on or 'the farm'}")


def audit(
    context: typer.Context,
    user: Annotated[str, typer.Option("--user", help="Only what this one did: ann, or root@alpha.")] = "",
    since: Annotated[str, typer.Option("--since", help="Only the last: 30m, 12h, 7d.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Show who changed what, from where, why, and what came of it; refusals too."""
    current = session(context, as_json)
    since_s = time.time() - parse_time_s(since) if since else 0.0
    found = current.call(lambda client: client.users.audit(user, since_s))
    if current.as_json:
        say_json(list(found))
        return
    for each in found:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.at_s))
        why = f" because {each.why!r}" if each.why else ""
        told = f": {each.told!r}" if each.told else ""
        # What others wrote is quoted: it could hold what a terminal obeys.
        say(f"{at}  {each.who} from {each.source}  {each.what!r}{why}  {each.outcome}{told}")


def _grants_of(user: UserView) -> str:
    return ", ".join(f"{each.role} on {each.on or 'the farm'}" for each in user.grants) or "nothing"


def _grant(role: Role, on: str) -> Grant:
    try:
        return Grant(role=role, on=on)
    except ValidationError as error:
        raise Refused(f"no such grant is possible: {words_of(error)}") from error


def _tell_token(current: Session, issued: IssuedToken) -> None:
    if current.as_json:
        say_json(issued)
        return
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(issued.expires_at_s))
    say(f"the token of user {issued.user}, good until {until}; it is shown this once:\n  {issued.token}")


def _tell_done(current: Session, name: str, words: str) -> None:
    if current.as_json:
        say_json({"name": name})
    else:
        say(f"user {name} {words}")

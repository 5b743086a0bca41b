"""Whose turn it is in a chat, kept in the page: what is sent is answered, or stays in the box, whatever comes first.

The page alone knows the order in which a person did things; their events may reach the app in another one, and the last
piece of an answer comes again with its end. So the page decides when a question is asked, and the app never writes into
the box:

- A question that is sent `waits` in the box. It is asked once no answer is at work, and nothing that ends one (Stop,
  Clear, another run) is on its way, `held`.
- The box is emptied as the question shows in the conversation, and only if it still holds what was asked. Where the
  question is taken out again, as it could not be answered, it comes back before what was typed since.
"""

_TURN = "const turn = window.chatTurn ??= {waits: false, held: 0, asked: '', before: 0, shown: false};"
_ASKED = "const questions = (messages) => (messages ?? []).filter((message) => message.role === 'user').length;"
_SAME = "{__type__: 'update'}"
_SEND = "document.querySelector('#chat-send')?.click()"

# The box -> what is said; a person sends what is in the box. Shown only where the answer does not begin at once.
SENT = f"""(text) => {{
    {_TURN}
    turn.waits = text.trim() !== '';
    return turn.waits ? '<span class="soft st-late">Waits for its turn.</span>' : {_SAME};
}}"""
# (run, box, tokens, temperature, base, tuned) -> the same, without a text where it is not the turn of any.
ASKED = f"""(run, text, tokens, warmth, base, tuned) => {{
    {_TURN} {_ASKED}
    if (turn.held || !turn.waits) return [run, '', tokens, warmth, base, tuned];
    Object.assign(turn, {{waits: false, asked: text, before: questions(base), shown: false}});
    return [run, text, tokens, warmth, base, tuned];
}}"""
# (the base's conversation, box) -> box.
SHOWN = f"""(base, text) => {{
    {_TURN} {_ASKED}
    const shown = questions(base) > turn.before;
    if (!turn.asked || shown === turn.shown) return {_SAME};
    turn.shown = shown;
    if (shown) return text === turn.asked ? '' : {_SAME};
    return text.trim() ? `${{turn.asked}}\\n${{text}}` : turn.asked;
}}"""
# An answer has ended.
NEXT = f"() => {{ {_TURN} if (turn.waits && !turn.held) {_SEND}; }}"
# What ends an answer is on its way, with its inputs; and has been done.
HELD = f"(...inputs) => {{ {_TURN} turn.held += 1; turn.asked = ''; return inputs; }}"
FREED = f"() => {{ {_TURN} turn.held -= 1; if (turn.waits && !turn.held) {_SEND}; }}"
# A question that waits stays where it is and is not asked.
UNASKED = f"() => {{ {_TURN} turn.waits = false; }}"
# (example, box) -> box and what is said; sent by NEXT.
EXAMPLE = f"""(words, text) => {{
    {_TURN}
    if (text.trim()) return [{_SAME}, '<span class="soft">Send what is in the box first, or empty it.</span>'];
    turn.waits = true;
    return [words, ''];
}}"""

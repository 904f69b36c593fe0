"""Stored responses and conversations (OpenAI's APIs of these names): what they say, and the token ids behind them.

    threads.py        where they are kept: contexts with notes, each response a place in one
    response_call.py  a call that makes a response
    context.py        what it goes on from
    stored.py         what is asked of stored responses
    conversations.py  conversations and their items
    items.py          items with ids, and lists of them page by page
"""

"""The page at /ui: pools, replicas and recent turns, live, and a playground.

    page.py  the routes, the hosts that they answer to, what a browser may load
    feed.py  what the page shows, as plain data
    static/  the page itself: HTML, CSS and JavaScript modules, served as they are
"""

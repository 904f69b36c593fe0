// What routers have told. Each router tells its own turns; with several, answers come now from one, now from another, and are
// put together here.

const FORGOTTEN_MS = 60_000;
export const VERSION = 1;

export class Store {
  constructor() {
    this.routers = new Map();
    this.told = null;
  }

  forget() {
    this.routers.clear();
    this.told = null;
  }

  /** What the next answer may leave out. */
  known() {
    return [...this.routers].map(([id, router]) => `${id}.${router.revision}`).join(",");
  }

  take(told, now = performance.now()) {
    if (told.version !== VERSION) throw new Error("The router was replaced by another version: reload this page.");
    const { id, revision } = told.router;
    const router = this.routers.get(id) ?? { turns: new Map() };
    Object.assign(router, { revision, seen: now });
    for (const turn of told.turns) router.turns.set(turn.number, { ...turn, router: id });
    for (const number of router.turns.keys()) if (number < told.oldest) router.turns.delete(number);
    this.routers.set(id, router);
    for (const [other, { seen }] of this.routers) if (now - seen > FORGOTTEN_MS) this.routers.delete(other);
    this.told = told;
  }

  turns() {
    return [...this.routers.values()].flatMap((router) => [...router.turns.values()]);
  }

  /** Lanes with their turns, oldest first; the lane of the latest turn comes first. */
  lanes() {
    const lanes = new Map();
    for (const turn of this.turns().sort((a, b) => a.began_at - b.began_at || a.number - b.number)) {
      const key = turn.session ? `session ${turn.session}` : `${turn.router} ${turn.lane}`;
      if (!lanes.has(key)) lanes.set(key, { key, session: turn.session, turns: [] });
      lanes.get(key).turns.push(turn);
    }
    return [...lanes.values()].reverse().sort((a, b) => b.turns.at(-1).began_at - a.turns.at(-1).began_at);
  }

  /** The turn of a request that this page has made. */
  turnOf(request) {
    return this.turns().find((turn) => turn.request.startsWith(request));
  }

  /** Replica -> its pool. */
  pools() {
    return new Map(this.told.pools.flatMap(({ pool, replicas }) => replicas.map(({ replica }) => [replica, pool])));
  }
}

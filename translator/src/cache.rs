//! The code cache of a process: which guest addresses are translated, the links between blocks, what writes make stale.
//!
//! Translation and linking happen under one lock; running threads need none. A thread that looks for a block is outside the code
//! ([`Member::active`] is false), so whoever needs the memory back waits until all are outside ([`Cache::flush`]).
//!
//! Order of locks: the watched pages of `FlatSpace`, then the one here. So pages are watched before the lock is taken, and the epoch
//! tells whether something became stale in between.

use crate::block::{CodeSource, MAX_INSNS, Scratch, page_of};
use crate::code_buffer::{CodeBuffer, ForkMark};
use crate::emit::ALL_OF_IT;
use crate::exits::Exits;
use crate::fault::kick;
use crate::jitdump;
use crate::lower::Leave;
use crate::marks::{Home, Registers};
use crate::persist::kin::{Kin, Librarian, Told, Used};
use crate::persist::{self, Archive};
use crate::route::{Policy, Routes};
use crate::stats::{CacheStats, Stats};
use crate::store::{Apart, MAX_BLOCK, Store};
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::mem::GuestMemory;
use bivisor_emulator::vcpu::Kicker;
use iced_x86::Mnemonic;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// Bytes of code a cache holds unless told otherwise.
pub const DEFAULT_SIZE: usize = 64 << 20;
/// Bytes of code that may be there when another program begins.
const MOST_STALE: usize = 4 << 20;
/// Of so many blocks some more are worth writing all.
const FEW_BLOCKS: u64 = 4096;

/// One thread that runs code of a cache.
#[derive(Default)]
pub struct Member {
    /// In the code, or about to go in.
    pub active: AtomicBool,
    /// Its host thread.
    pub tid: AtomicI32,
    /// What makes it come out.
    pub kicker: Kicker,
    /// What it has done, as of the last time it came back, if the cache [counts](Cache::count).
    pub stats: Mutex<Stats>,
}

/// How a thread came to need a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// From outside.
    Start,
    /// Through this exit, taken when that many flushes had been: to be linked.
    Link(u32, u64),
    /// By an indirect branch: the target is to be entered in the table.
    Indirect,
}

/// A place to enter, valid until the next flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Host address.
    pub host: u64,
    /// [`Cache::flushes`] when it was found.
    pub flushes: u64,
}

/// The code cache.
pub struct Cache {
    store: Mutex<Store>,
    exits: Exits,
    routes: Routes,
    policy: Policy,
    /// Host addresses of the code.
    range: (u64, u64),
    /// Distinguishes the tables that can be mapped behind a thread block.
    id: AtomicU64,
    /// Raised whenever an entry found earlier may be stale.
    version: AtomicU64,
    flushes: AtomicU64,
    flushing: AtomicBool,
    flush_lock: Mutex<()>,
    members: Mutex<Vec<Arc<Member>>>,
    /// The flat space that tells us of stale pages.
    listening: AtomicU64,
    fork: ForkMark,
    /// Takes our place in a forked child if another thread was at work in here at the time of the fork.
    successor: OnceLock<Arc<Cache>>,
    model: Arc<CpuModel>,
    kin: Mutex<Kin>,
    counting: AtomicBool,
    /// What members did that have left.
    gone: Mutex<Stats>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Cache {
    /// An empty cache for code of `model`.
    ///
    /// # Errors
    /// The host's, if it gives no executable memory.
    pub fn new(model: Arc<CpuModel>, policy: Policy, size: usize) -> std::io::Result<Arc<Cache>> {
        // What is reserved behind a thread's block would otherwise lie between the code and the guest, which have to be near each other.
        let _ = ThreadBlock::make();
        let buffer = CodeBuffer::new(size.max(4 * MAX_BLOCK))?;
        let range = (buffer.base(), buffer.base() + buffer.size() as u64);
        Ok(Arc::new(Cache {
            store: Mutex::new(Store::new(buffer)),
            exits: Exits::default(),
            routes: Routes::new(model.clone(), policy),
            policy,
            range,
            id: AtomicU64::new(NEXT_ID.fetch_add(1, Ordering::Relaxed)),
            version: AtomicU64::new(1),
            flushes: AtomicU64::new(0),
            flushing: AtomicBool::new(false),
            flush_lock: Mutex::new(()),
            members: Mutex::new(Vec::new()),
            listening: AtomicU64::new(0),
            fork: ForkMark::new()?,
            successor: OnceLock::new(),
            model,
            kin: Mutex::new(Kin::default()),
            counting: AtomicBool::new(false),
            gone: Mutex::new(Stats::default()),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().expect("no panic under the lock")
    }

    /// The CPU its code is for.
    pub fn model(&self) -> &Arc<CpuModel> {
        &self.model
    }

    /// What its code may take from the host.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Host addresses of the code.
    pub fn range(&self) -> (u64, u64) {
        self.range
    }

    /// See [`Exits::leave`].
    pub fn leave(&self, exit: u32) -> Leave {
        self.exits.leave(exit)
    }

    /// See [`Exits::home`].
    pub fn home(&self, exit: u32) -> Home {
        self.exits.home(exit)
    }

    /// See [`Exits::rip`].
    pub fn rip(&self, exit: u32) -> u64 {
        self.exits.rip(exit)
    }

    /// Which way instructions are lowered.
    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// Changes when an entry found earlier may be stale.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Distinguishes caches, also a forked child's from its parent's.
    pub fn id(&self) -> u64 {
        self.id.load(Ordering::Relaxed)
    }

    /// How often everything was thrown away.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::SeqCst)
    }

    /// Counters.
    pub fn stats(&self) -> CacheStats {
        let store = self.lock();
        let (memory, live_bytes) = store.memory();
        CacheStats { memory, live_bytes, ..store.stats }
    }

    /// From now on, time is taken and what threads do is summed up.
    pub fn count(&self) {
        self.counting.store(true, Ordering::Relaxed);
    }

    /// Was [`Cache::count`] called?
    pub fn counts(&self) -> bool {
        self.counting.load(Ordering::Relaxed)
    }

    /// From now on, translations of earlier runs are used, and [`Cache::keep`] gives what is worth keeping of this one. Call it before
    /// the cache is used.
    pub fn remember(&self, archive: Arc<Archive>) {
        let mut store = self.lock();
        store.keep_pages(archive.blocks());
        store.archive = Some(archive);
    }

    /// What is kept for a program is found so, also for those that children execute.
    pub fn set_librarian(&self, librarian: Librarian) {
        if let Ok(mut kin) = self.kin.try_lock() {
            kin.librarian = Some(librarian);
        }
    }

    /// What was used of what is kept for this program.
    pub fn used(&self) -> Vec<Used> {
        let store = self.lock();
        store.archive.as_ref().map_or_else(Vec::new, |archive| store.used(archive))
    }

    /// Takes over code that was used elsewhere, for programs to come.
    pub fn prepare(&self, archive: &Archive, used: &[Used]) {
        self.lock().prepare(&self.exits, archive, used);
    }

    /// Tells the process that has forked this one what was used of what is kept for this program.
    pub fn tell(&self, program: &Path) {
        let Ok(kin) = self.kin.try_lock() else { return };
        let told = || {
            let stamp = self.lock().archive.as_ref()?.stamp();
            Some(Told { program: program.into(), stamp, used: self.used() })
        };
        if let Some(board) = &kin.parent {
            board.tell(told, program);
        }
    }

    /// Must be called before a fork after which both go on.
    pub fn before_fork(&self) {
        let prepare = self.kin.try_lock().ok().and_then(|mut kin| kin.before_fork());
        if let Some((archive, used)) = prepare {
            self.prepare(&archive, &used);
        }
        self.lock().freeze();
    }

    /// Another program begins; nothing will be left of the old one in memory, where `text` are the mappings of files that cannot be
    /// written. The caller is the only thread, and outside.
    pub fn start_over(&self, text: &[Range<u64>]) {
        let mut store = self.lock();
        store.taken.clear();
        // What is stale takes room; filling it up and throwing it away is cheaper than throwing little away each time.
        if store.buffer.used() > MOST_STALE {
            self.forget(&mut store);
        }
        store.park(&self.exits, text);
        self.version.fetch_add(1, Ordering::SeqCst);
        store.began = store.blocks.len();
        store.stats.adopted = 0;
        store.archive = None;
    }

    /// What later runs may [remember](Cache::remember), as a file's content for `key`; `None` if that is not much more than this run
    /// remembered itself.
    pub fn keep(&self, key: &[u8]) -> Option<Vec<u8>> {
        let store = self.lock();
        let archive = store.archive.clone()?;
        let adopted = store.stats.adopted;
        let few = if adopted < FEW_BLOCKS { 8 } else { adopted / 8 };
        if store.made() < adopted + few || store.worth_keeping() < adopted + few {
            return None;
        }
        let new = store.clusters(&self.exits);
        drop(store);
        Archive::write(key, &new, &archive)
    }

    /// Host address, size and guest address of each block there is, a line each in perf(1)'s format for generated code
    /// (tools/perf/Documentation/jit-interface.txt).
    pub fn map(&self) -> String {
        self.lock().map(self.range.0)
    }

    /// The same for `perf inject --jit`, see [`crate::jitdump`].
    pub fn jitdump(&self, when: Duration) -> Vec<u8> {
        jitdump::content(std::process::id(), when, self.lock().all_code(self.range.0))
    }

    /// What all threads together have done, up to the last time each came back.
    pub fn totals(&self) -> Stats {
        let mut all = *self.gone.lock().expect("no panic under the lock");
        for m in self.members.lock().expect("no panic under the lock").iter() {
            all.add(&m.stats.lock().expect("no panic under the lock"));
        }
        all
    }

    /// A thread that will run its code.
    pub fn join(&self, member: &Arc<Member>) {
        self.members.lock().expect("no panic under the lock").push(member.clone());
    }

    /// It will no more.
    pub fn part(&self, member: &Arc<Member>) {
        self.members.lock().expect("no panic under the lock").retain(|m| !Arc::ptr_eq(m, member));
        if self.counts() {
            self.gone
                .lock()
                .expect("no panic under the lock")
                .add(&member.stats.lock().expect("no panic under the lock"));
        }
    }

    /// Says that `member` goes in. False if `entry` is no longer good.
    pub fn go_in(&self, member: &Member, entry: Entry) -> bool {
        member.active.store(true, Ordering::SeqCst);
        if self.flushing.load(Ordering::SeqCst) || self.flushes() != entry.flushes {
            member.active.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    /// Maps the table of branch targets behind the calling thread's block if it is not there yet.
    pub fn map_table(&self, block: &ThreadBlock, owner_slot: usize) {
        let id = self.id.load(Ordering::Relaxed);
        if block.scratch[owner_slot].get() != id {
            let all = block.scratch[owner_slot].get() >= ALL_OF_IT;
            self.lock().buffer.map_table(block, all).expect("the table of branch targets can be mapped");
            block.scratch[owner_slot].set(id);
        }
    }

    /// Makes `mem` tell this cache of stale pages.
    pub fn listen(self: &Arc<Cache>, mem: &GuestMemory) {
        let Some(flat) = mem.flat() else { return };
        let id = flat.id();
        if self.listening.load(Ordering::Relaxed) != id && self.listening.swap(id, Ordering::Relaxed) != id {
            let weak = Arc::downgrade(self);
            flat.listen(Box::new(move |page| match weak.upgrade() {
                Some(cache) => {
                    cache.stale(page);
                    true
                }
                None => false,
            }));
        }
    }

    /// The block at `rip`, translated if it must be; `None` if its first instruction cannot be.
    pub fn resolve(&self, source: &mut dyn CodeSource, rip: u64, via: Via, scratch: &mut Scratch) -> Option<Entry> {
        let most = MAX_INSNS;
        let home = if let Via::Link(exit, _) = via { self.exits.home(exit) } else { Home::Slot };
        let mut store = self.lock();
        let mut wanted = rip;
        loop {
            if let Some(found) = store.get(rip, home) {
                store.stats.found += 1;
                return Some(self.connect(&mut store, found, via));
            }
            if let Some(pages) = store.parked_at(rip) {
                drop(store);
                let epoch = source.epoch();
                let same = persist::park::is_same(source, &pages);
                store = self.lock();
                if source.epoch() == epoch {
                    store.settle(&self.exits, rip, same);
                }
                continue;
            }
            let archive = store.archive.clone();
            if let Some(archive) = &archive
                && !store.was_asked(wanted)
            {
                drop(store);
                let page = page_of(wanted);
                let epoch = source.epoch();
                let found = persist::adopt::content_of(source, page);
                store = self.lock();
                if source.epoch() == epoch {
                    store.note_page(archive, page, found);
                }
                continue;
            }
            if let Some(archive) = &archive
                && let Some(mut found) = store.find_kept(archive, rip, home)
            {
                let mut same = true;
                if !found.is_known() {
                    drop(store);
                    let epoch = source.epoch();
                    let contents = found.look(source);
                    store = self.lock();
                    same = source.epoch() == epoch;
                    for (page, content) in contents.into_iter().filter(|_| same) {
                        store.note_page(archive, page, Some(content));
                    }
                }
                if same {
                    store.adopt(&self.exits, archive, &found);
                }
                continue;
            }
            drop(store);
            let begin = self.counts().then(Instant::now);
            let epoch = source.epoch();
            if !scratch.decode(source, rip, &self.routes, most) {
                return None;
            }
            store = self.lock();
            // To be kept, it needs the sums of both its pages.
            wanted = scratch.block.end().wrapping_sub(1);
            if !store.was_asked(wanted) {
                continue;
            }
            if source.epoch() != epoch || store.get(rip, home).is_some() {
                continue;
            }
            if store.is_full() {
                let seen = self.flushes();
                drop(store);
                self.flush(seen);
                store = self.lock();
                continue;
            }
            if scratch.block.compared {
                store.note_compared(&mut scratch.block);
            }
            let found = store.insert(&self.exits, &scratch.block, home, via == Via::Indirect);
            if let Some(begin) = begin {
                store.stats.nanoseconds += begin.elapsed().as_nanos() as u64;
            }
            return Some(self.connect(&mut store, found, via));
        }
    }

    /// Is what is at this address a trace, if anything?
    pub fn is_trace(&self, rip: u64) -> bool {
        self.lock().is_trace(rip)
    }

    /// Makes a trace of the instructions at these addresses, each of which led to the next. False if they cannot be had, or
    /// are too many.
    pub fn add_trace(&self, source: &mut dyn CodeSource, path: &[u64], scratch: &mut Scratch) -> bool {
        let epoch = source.epoch();
        if !scratch.decode_path(source, path, &self.routes) {
            return false;
        }
        let mut store = self.lock();
        if source.epoch() != epoch {
            return false;
        }
        let made = store.insert_trace(&self.exits, &scratch.block);
        self.version.fetch_add(1, Ordering::SeqCst);
        made
    }

    /// Code for at most `most` instructions at `rip`, linked to nothing and found by nobody else; `None` if the first cannot be
    /// translated, or pushes flags and must not.
    pub fn apart(
        &self,
        mem: &GuestMemory,
        rip: u64,
        most: usize,
        may_push_flags: bool,
        scratch: &mut Scratch,
    ) -> Option<(Entry, Apart)> {
        if !scratch.decode(&mut { mem }, rip, &self.routes, most.min(MAX_INSNS)) {
            return None;
        }
        // It is executed at once.
        scratch.block.compared = false;
        let pushes = matches!(scratch.block.items[0].iced.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfq);
        if pushes && !may_push_flags {
            return None;
        }
        loop {
            let mut store = self.lock();
            let flushes = self.flushes();
            if !store.is_full() {
                let apart = store.insert_apart(&self.exits, &scratch.block);
                return Some((Entry { host: self.range.0 + u64::from(apart.body), flushes }, apart));
            }
            drop(store);
            self.flush(flushes);
        }
    }

    fn connect(&self, store: &mut Store, (block, body): (u32, u32), via: Via) -> Entry {
        let flushes = self.flushes();
        match via {
            Via::Link(exit, then) if then == flushes => store.link(&self.exits, exit, block),
            Via::Indirect => {
                store.add_landing(block);
                if store.widen() {
                    self.id.store(NEXT_ID.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
                }
            }
            Via::Start | Via::Link(..) => {}
        }
        Entry { host: self.range.0 + u64::from(body), flushes }
    }

    /// A page was written, unmapped or changed its rights: what was made from it is no more.
    pub fn stale(&self, page: u64) {
        if self.lock().stale(&self.exits, page) {
            self.version.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// See [`Store::changed`].
    pub fn changed(&self, rip: u64) {
        self.lock().changed(&self.exits, rip);
    }

    /// Throws everything away, after all threads have left the code, unless that has been done since there were `seen` flushes. The
    /// caller is not in the code. No lock that threads need on their way out is held while waiting for them.
    pub fn flush(&self, seen: u64) {
        let _one = self.flush_lock.lock().expect("no panic under the lock");
        if self.flushes() != seen {
            return;
        }
        self.flushing.store(true, Ordering::SeqCst);
        let members = self.members.lock().expect("no panic under the lock").clone();
        for m in members {
            while m.active.load(Ordering::SeqCst) {
                m.kicker.expect();
                kick(m.tid.load(Ordering::SeqCst));
                std::thread::yield_now();
            }
        }
        let mut store = self.lock();
        self.forget(&mut store);
        store.stats.flushes += 1;
        self.flushing.store(false, Ordering::SeqCst);
    }

    fn forget(&self, store: &mut Store) {
        store.forget();
        let flushes = self.flushes.fetch_add(1, Ordering::SeqCst) + 1;
        store.buffer.set_generation(flushes);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Mends the registers of a thread that a signal found at host address `pc`; gives RIP, and whether the host's instruction there was
    /// one that only looks at a branch target. The thread is still a member that counts as active, so that nothing was thrown away since.
    pub fn recover(&self, pc: u64, regs: &mut dyn Registers) -> (u64, bool) {
        let store = self.lock();
        let offset = pc.wrapping_sub(self.range.0) as u32;
        (store.recover(offset, regs, &self.exits), store.probes(offset))
    }

    /// The guest instruction at a host address that may be in the code, e.g. an x87 instruction pointer.
    pub fn guest_address(&self, pc: u64) -> Option<u64> {
        let inside = (self.range.0..self.range.1).contains(&pc);
        inside.then(|| self.lock().guest_address((pc - self.range.0) as u32, &self.exits)).flatten()
    }

    /// Is it certain that [`Cache::current`] gives this one?
    #[inline]
    pub fn is_current(&self) -> bool {
        !self.fork.forked()
    }

    /// Must be called by whoever uses the cache first after a possible fork: gives the cache to use from now on.
    ///
    /// # Panics
    /// If the host has no memory for the child's copy.
    pub fn current(self: &Arc<Cache>) -> Arc<Cache> {
        if !self.fork.forked() {
            return self.clone();
        }
        if let Some(next) = self.successor.get() {
            return next.current();
        }
        match (self.store.try_lock(), self.flush_lock.try_lock(), self.members.try_lock()) {
            (Ok(mut store), Ok(_), Ok(mut members)) => {
                self.after_fork(&mut store, &mut members);
                self.clone()
            }
            _ => {
                let size = (self.range.1 - self.range.0) as usize;
                self.successor
                    .get_or_init(|| {
                        let next =
                            Cache::new(self.model.clone(), self.policy, size).expect("memory for the code cache");
                        next.counting.store(self.counts(), Ordering::Relaxed);
                        next
                    })
                    .clone()
            }
        }
    }

    /// In a forked child: the memory was shared with the parent, which goes on changing it. Content that is ours is copied, then every
    /// jump the parent may have patched since is set as we know it.
    fn after_fork(&self, store: &mut Store, members: &mut Vec<Arc<Member>>) {
        store.after_fork().expect("memory for the code cache");
        // Threads of the parent are not here.
        for m in members.iter() {
            m.active.store(false, Ordering::SeqCst);
        }
        members.retain(|m| Arc::strong_count(m) > 1);
        self.flushing.store(false, Ordering::SeqCst);
        self.id.store(NEXT_ID.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if store.buffer.generation() == self.flushes() {
            store.restore(&self.exits);
        } else {
            // The parent flushed while we copied.
            self.forget(store);
        }
        self.version.fetch_add(1, Ordering::SeqCst);
        if let Ok(mut kin) = self.kin.try_lock() {
            kin.after_fork();
        }
        self.fork.set();
    }

    /// The code of the block at a guest address, with its host address: for tests.
    pub fn code(&self, rip: u64) -> Option<(u64, Vec<u8>)> {
        self.lock().code(rip).map(|(at, code)| (self.range.0 + u64::from(at), code))
    }
}

//! The code cache of a process: which guest addresses are translated, the links between blocks, what writes make stale.
//!
//! Translation and linking happen under one lock; running threads need none. A thread that looks for a block is outside the code
//! ([`Member::active`] is false), so whoever needs the memory back waits until all are outside ([`Cache::flush`]).
//!
//! Order of locks: the watched pages of `FlatSpace`, then the one here. So pages are watched before the lock is taken, and the epoch
//! tells whether something became stale in between.

use crate::block::{CodeSource, GuestBlock, MAX_INSNS, decode_block};
use crate::code_buffer::{CodeBuffer, ForkMark, TABLE_ENTRIES};
use crate::emit::Emitter;
use crate::exits::{Exits, MAX_EXITS};
use crate::fault::kick;
use crate::lower::memory::MemoryModel;
use crate::lower::{Exit, Landing, Leave, Surroundings, Unit, emit_landing, emit_trampolines, lower};
use crate::marks::{self, Mark, Registers};
use crate::route::{Policy, Routes, Setting};
use crate::stats::CacheStats;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::mem::GuestMemory;
use iced_x86::Mnemonic;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// Bytes of code a cache holds unless told otherwise.
pub const DEFAULT_SIZE: usize = 64 << 20;
/// More than one block can need.
const MAX_BLOCK: usize = 16 << 10;

/// A hasher for addresses.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(u64::from(*b));
        }
    }
    fn write_u64(&mut self, v: u64) {
        let x = (self.0 ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = x ^ (x >> 32);
    }
    fn write_u16(&mut self, v: u16) {
        self.write_u64(u64::from(v));
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// One thread that runs code of a cache.
#[derive(Default)]
pub struct Member {
    /// In the code, or about to go in.
    pub active: AtomicBool,
    /// Its host thread.
    pub tid: AtomicI32,
}

struct Block {
    start: u64,
    /// Guest pages it was made from.
    pages: [u64; 2],
    /// Code offsets.
    at: u32,
    end: u32,
    body: u32,
    landing: Option<Landing>,
    marks: Box<[Mark]>,
    /// Exits linked to it.
    incoming: Vec<u32>,
    live: bool,
}

struct Inner {
    buffer: CodeBuffer,
    /// In order of code offset; the first is the trampolines.
    blocks: Vec<Block>,
    by_guest: Map<u64, u32>,
    by_page: Map<u64, Vec<u32>>,
    /// The landings of a table entry, in the order in which they are tried.
    buckets: Map<u16, Vec<Landing>>,
    exits_used: u32,
    miss: u32,
    keep: usize,
    stats: CacheStats,
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
    inner: Mutex<Inner>,
    exits: Exits,
    routes: Routes,
    policy: Policy,
    setting: Setting,
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
    listening: AtomicUsize,
    fork: ForkMark,
    /// Takes our place in a forked child if another thread was at work in here at the time of the fork.
    successor: OnceLock<Arc<Cache>>,
    model: Arc<CpuModel>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Cache {
    /// An empty cache for code of `model`.
    ///
    /// # Errors
    /// The host's, if it gives no executable memory.
    pub fn new(model: Arc<CpuModel>, policy: Policy, size: usize) -> std::io::Result<Arc<Cache>> {
        Cache::for_setting(model, policy, size, Setting::Flat)
    }

    /// An empty cache for another kind of guest.
    ///
    /// # Errors
    /// As for [`Cache::new`].
    pub fn for_setting(
        model: Arc<CpuModel>,
        policy: Policy,
        size: usize,
        setting: Setting,
    ) -> std::io::Result<Arc<Cache>> {
        let mut buffer = CodeBuffer::new(size.max(4 * MAX_BLOCK))?;
        let mut e = Emitter::new(buffer.base());
        let mut marks = Vec::new();
        let miss = emit_trampolines(&mut e, &mut marks);
        buffer.append(&e.bytes);
        buffer.fill_targets(miss);
        let range = (buffer.base(), buffer.base() + buffer.size() as u64);
        let trampolines = Block {
            start: 0,
            pages: [u64::MAX; 2],
            at: 0,
            end: buffer.used() as u32,
            body: 0,
            landing: None,
            marks: marks.into(),
            incoming: Vec::new(),
            live: false,
        };
        let inner = Inner {
            keep: buffer.used(),
            buffer,
            blocks: vec![trampolines],
            by_guest: Map::default(),
            by_page: Map::default(),
            buckets: Map::default(),
            exits_used: 0,
            miss: miss as u32,
            stats: CacheStats::default(),
        };
        Ok(Arc::new(Cache {
            inner: Mutex::new(inner),
            exits: Exits::default(),
            routes: Routes::new(model.clone(), policy, setting),
            policy,
            setting,
            range,
            id: AtomicU64::new(NEXT_ID.fetch_add(1, Ordering::Relaxed)),
            version: AtomicU64::new(1),
            flushes: AtomicU64::new(0),
            flushing: AtomicBool::new(false),
            flush_lock: Mutex::new(()),
            members: Mutex::new(Vec::new()),
            listening: AtomicUsize::new(0),
            fork: ForkMark::new()?,
            successor: OnceLock::new(),
            model,
        }))
    }

    fn one_at_a_time(&self) -> bool {
        matches!(self.setting, Setting::Checked { single: true, .. })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic under the lock")
    }

    /// The CPU its code is for.
    pub fn model(&self) -> &Arc<CpuModel> {
        &self.model
    }

    /// Which way instructions are lowered.
    pub fn routes(&self) -> &Routes {
        &self.routes
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

    /// See [`Exits::rip`].
    pub fn rip(&self, exit: u32) -> u64 {
        self.exits.rip(exit)
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
        self.lock().stats
    }

    /// A thread that will run its code.
    pub fn join(&self, member: &Arc<Member>) {
        self.members.lock().expect("no panic under the lock").push(member.clone());
    }

    /// It will no more.
    pub fn part(&self, member: &Arc<Member>) {
        self.members.lock().expect("no panic under the lock").retain(|m| !Arc::ptr_eq(m, member));
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
            self.lock().buffer.map_table(block).expect("the table of branch targets can be mapped");
            block.scratch[owner_slot].set(id);
        }
    }

    /// Makes `mem` tell this cache of stale pages.
    pub fn listen(self: &Arc<Cache>, mem: &GuestMemory) {
        let Some(flat) = mem.flat() else { return };
        let address = std::ptr::from_ref(flat) as usize;
        if self.listening.load(Ordering::Relaxed) != address
            && self.listening.swap(address, Ordering::Relaxed) != address
        {
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
    pub fn resolve(&self, source: &mut dyn CodeSource, rip: u64, via: Via) -> Option<Entry> {
        let most = if self.one_at_a_time() { 1 } else { MAX_INSNS };
        loop {
            let mut inner = self.lock();
            if let Some(&b) = inner.by_guest.get(&rip) {
                return Some(self.connect(&mut inner, b, via));
            }
            drop(inner);
            let epoch = source.epoch();
            let block = decode_block(source, rip, &self.routes, most)?;
            let mut inner = self.lock();
            if source.epoch() != epoch || inner.by_guest.contains_key(&rip) {
                continue;
            }
            if self.is_full(&inner) {
                let seen = self.flushes();
                drop(inner);
                self.flush(seen);
                continue;
            }
            let b = self.insert(&mut inner, &block, via == Via::Indirect && !self.one_at_a_time());
            return Some(self.connect(&mut inner, b, via));
        }
    }

    fn is_full(&self, inner: &Inner) -> bool {
        !inner.buffer.fits(MAX_BLOCK) || inner.exits_used + 256 > MAX_EXITS
    }

    /// Code for the one instruction at `rip`, linked to nothing and found by nobody else; `None` if it cannot be translated, or
    /// pushes flags and must not.
    pub fn single(&self, mem: &GuestMemory, rip: u64, may_push_flags: bool) -> Option<Entry> {
        let block = decode_block(&mut { mem }, rip, &self.routes, 1)?;
        if !may_push_flags && matches!(block.items[0].iced.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfq) {
            return None;
        }
        loop {
            let mut inner = self.lock();
            let flushes = self.flushes();
            if self.is_full(&inner) {
                drop(inner);
                self.flush(flushes);
                continue;
            }
            let mut unit = lower(&block, &self.surroundings(&inner, false, &|_| None), false);
            let (exits, body) = (std::mem::take(&mut unit.exits), unit.body);
            let at = self.append(&mut inner, rip, [u64::MAX; 2], unit, &exits, false).1;
            return Some(Entry { host: self.range.0 + u64::from(at + body), flushes });
        }
    }

    fn surroundings<'a>(
        &self,
        inner: &'a Inner,
        linked: bool,
        known: &'a dyn Fn(u64) -> Option<u64>,
    ) -> Surroundings<'a> {
        let base = self.range.0;
        Surroundings {
            at: base + inner.buffer.next() as u64,
            first_exit: inner.exits_used,
            exit: base,
            miss: base + u64::from(inner.miss),
            known,
            model: if self.setting == Setting::Flat { MemoryModel::Flat } else { MemoryModel::Checked },
            linked,
        }
    }

    fn connect(&self, inner: &mut Inner, b: u32, via: Via) -> Entry {
        let flushes = self.flushes();
        match via {
            Via::Start => {}
            Via::Link(exit, then) if then == flushes && !self.one_at_a_time() => {
                let (site, _) = self.exits.places(exit);
                inner.buffer.patch(site, inner.blocks[b as usize].body as usize);
                inner.blocks[b as usize].incoming.push(exit);
                self.exits.set_linked(exit, Some(b));
                inner.stats.links += 1;
            }
            Via::Link(..) => {}
            Via::Indirect if self.one_at_a_time() => {}
            Via::Indirect => {
                if inner.blocks[b as usize].landing.is_none() && inner.buffer.fits(MAX_BLOCK) {
                    add_landing(inner, b);
                }
            }
        }
        Entry { host: self.range.0 + u64::from(inner.blocks[b as usize].body), flushes }
    }

    fn insert(&self, inner: &mut Inner, block: &GuestBlock, landing: bool) -> u32 {
        let base = self.range.0;
        let known = |g| inner.by_guest.get(&g).map(|b| base + u64::from(inner.blocks[*b as usize].body));
        let mut unit = lower(block, &self.surroundings(inner, !self.one_at_a_time(), &known), landing);
        let end = block.start.wrapping_add(u64::from(unit.guest_len));
        let page = |a: u64| a & !(bivisor_emulator::mem::PAGE_SIZE - 1);
        let pages = [page(block.start), page(end.wrapping_sub(1))];
        let first_exit = inner.exits_used;
        let (exits, landing) = (std::mem::take(&mut unit.exits), unit.landing);
        let (b, at) = self.append(inner, block.start, pages, unit, &exits, true);
        inner.by_guest.insert(block.start, b);
        inner.by_page.entry(pages[0]).or_default().push(b);
        if pages[1] != pages[0] {
            inner.by_page.entry(pages[1]).or_default().push(b);
        }
        for (id, exit) in (first_exit..).zip(&exits) {
            if let (Leave::To(target), Some(_)) = (exit.leave, exit.linked)
                && let Some(&to) = inner.by_guest.get(&target)
            {
                inner.blocks[to as usize].incoming.push(id);
                self.exits.set_linked(id, Some(to));
            }
        }
        if let Some(l) = landing {
            register(inner, b, Landing { at: at + l.at, next: at + l.next });
        }
        b
    }

    /// Puts code into the buffer and its exits into the table; gives the block's number and code offset.
    fn append(
        &self,
        inner: &mut Inner,
        start: u64,
        pages: [u64; 2],
        unit: Unit,
        exits: &[Exit],
        live: bool,
    ) -> (u32, u32) {
        let at = inner.buffer.append(&unit.code) as u32;
        count(&mut inner.stats, &unit);
        for (id, exit) in (inner.exits_used..).zip(exits) {
            self.exits.set(id, exit.leave, at.wrapping_add(exit.site), at + exit.stub);
        }
        inner.exits_used += exits.len() as u32;
        inner.blocks.push(Block {
            start,
            pages,
            at,
            end: at + unit.code.len() as u32,
            body: at + unit.body,
            landing: None,
            marks: unit.marks.into(),
            incoming: Vec::new(),
            live,
        });
        (inner.blocks.len() as u32 - 1, at)
    }

    /// A page was written, unmapped or changed its rights: what was made from it is no more.
    pub fn stale(&self, page: u64) {
        let mut inner = self.lock();
        let Some(blocks) = inner.by_page.remove(&page) else { return };
        for b in blocks {
            self.kill(&mut inner, b);
        }
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    fn kill(&self, inner: &mut Inner, b: u32) {
        let block = &mut inner.blocks[b as usize];
        if !std::mem::replace(&mut block.live, false) {
            return;
        }
        let (start, incoming, landing) = (block.start, std::mem::take(&mut block.incoming), block.landing.take());
        for page in block.pages {
            if let Some(list) = inner.by_page.get_mut(&page) {
                list.retain(|x| *x != b);
            }
        }
        inner.stats.stale += 1;
        inner.by_guest.remove(&start);
        for exit in incoming {
            // Another block may have taken the place since.
            if self.exits.linked(exit) == Some(b) {
                let (site, stub) = self.exits.places(exit);
                inner.buffer.patch(site, stub);
                self.exits.set_linked(exit, None);
            }
        }
        if let Some(l) = landing {
            let bucket = start as u16;
            if let Some(list) = inner.buckets.get_mut(&bucket) {
                list.retain(|x| *x != l);
            }
            chain(inner, bucket);
        }
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
                kick(m.tid.load(Ordering::SeqCst));
                std::thread::yield_now();
            }
        }
        let mut inner = self.lock();
        self.forget(&mut inner);
        inner.stats.flushes += 1;
        self.flushing.store(false, Ordering::SeqCst);
    }

    fn forget(&self, inner: &mut Inner) {
        inner.buffer.reset(inner.keep);
        if !inner.buckets.is_empty() {
            inner.buffer.fill_targets(inner.miss as usize);
        }
        inner.blocks.truncate(1);
        inner.by_guest.clear();
        inner.by_page.clear();
        inner.buckets.clear();
        inner.exits_used = 0;
        let flushes = self.flushes.fetch_add(1, Ordering::SeqCst) + 1;
        inner.buffer.set_generation(flushes);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Mends the registers of a thread that a signal found at host address `pc`; gives RIP. The thread is still a member that counts as
    /// active, so that nothing was thrown away since.
    pub fn recover(&self, pc: u64, regs: &mut dyn Registers) -> u64 {
        let inner = self.lock();
        let at = pc.wrapping_sub(self.range.0) as u32;
        let i = inner.blocks.partition_point(|b| b.at <= at).saturating_sub(1);
        let block = &inner.blocks[i];
        marks::recover(&block.marks, block.start, (at - block.at) as usize, regs, &|id| self.exits.rip(id))
    }

    /// The guest instruction at a host address that may be in the code, e.g. an x87 instruction pointer.
    pub fn guest_address(&self, pc: u64) -> Option<u64> {
        if !(self.range.0..self.range.1).contains(&pc) {
            return None;
        }
        let inner = self.lock();
        let at = (pc - self.range.0) as u32;
        let i = inner.blocks.partition_point(|b| b.at <= at).checked_sub(1)?;
        let block = &inner.blocks[i];
        (at < block.end).then(|| {
            marks::recover(&block.marks, block.start, (at - block.at) as usize, &mut NoRegisters, &|id| {
                self.exits.rip(id)
            })
        })
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
        match (self.inner.try_lock(), self.flush_lock.try_lock()) {
            (Ok(mut inner), Ok(_)) => {
                self.after_fork(&mut inner);
                self.clone()
            }
            _ => {
                let size = (self.range.1 - self.range.0) as usize;
                self.successor
                    .get_or_init(|| {
                        Cache::new(self.model.clone(), self.policy, size).expect("memory for the code cache")
                    })
                    .clone()
            }
        }
    }

    /// In a forked child: the memory was shared with the parent, which goes on changing it. Content that is ours is copied, then every
    /// jump the parent may have patched since is set as we know it.
    fn after_fork(&self, inner: &mut Inner) {
        inner.buffer.after_fork().expect("memory for the code cache");
        // Threads of the parent are not here.
        if let Ok(mut members) = self.members.try_lock() {
            for m in members.iter() {
                m.active.store(false, Ordering::SeqCst);
            }
            members.retain(|m| Arc::strong_count(m) > 1);
        }
        self.flushing.store(false, Ordering::SeqCst);
        self.id.store(NEXT_ID.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if inner.buffer.generation() == self.flushes() {
            for id in 0..inner.exits_used {
                if let Leave::To(_) = self.exits.leave(id) {
                    let (site, stub) = self.exits.places(id);
                    let to = self.exits.linked(id).map_or(stub, |b| inner.blocks[b as usize].body as usize);
                    inner.buffer.patch(site, to);
                }
            }
            inner.buffer.fill_targets(inner.miss as usize);
            for bucket in inner.buckets.keys().copied().collect::<Vec<_>>() {
                chain(inner, bucket);
            }
        } else {
            // The parent flushed while we copied.
            self.forget(inner);
        }
        self.version.fetch_add(1, Ordering::SeqCst);
        self.fork.set();
    }

    /// The code of the block at a guest address, with its host address: for tests.
    pub fn code(&self, rip: u64) -> Option<(u64, Vec<u8>)> {
        let inner = self.lock();
        let b = &inner.blocks[*inner.by_guest.get(&rip)? as usize];
        Some((self.range.0 + u64::from(b.at), inner.buffer.code(b.at as usize..b.end as usize)))
    }
}

/// For places where no register is in a slot.
struct NoRegisters;

impl Registers for NoRegisters {
    fn gpr(&self, _r: bivisor_emulator::isa::Gpr) -> u64 {
        0
    }
    fn set_gpr(&mut self, _r: bivisor_emulator::isa::Gpr, _v: u64) {}
    fn set_status(&mut self, _v: u64) {}
    fn slot(&self, _i: usize) -> u64 {
        0
    }
}

fn count(stats: &mut CacheStats, unit: &Unit) {
    stats.blocks += 1;
    stats.insns += u64::from(unit.insns);
    stats.guest_bytes += u64::from(unit.guest_len);
    stats.host_bytes += unit.code.len() as u64;
}

/// Makes a landing for a block that has none, apart from its body.
fn add_landing(inner: &mut Inner, b: u32) {
    let at = inner.buffer.next();
    let base = inner.buffer.base();
    let block = &inner.blocks[b as usize];
    let (start, body) = (block.start, base + u64::from(block.body));
    let mut e = Emitter::new(base + at as u64);
    let mut marks = Vec::new();
    let l = emit_landing(&mut e, &mut marks, start, base + u64::from(inner.miss));
    e.bytes.extend_from_slice(&[0xe9, 0, 0, 0, 0]);
    let site = e.len() - 4;
    e.set_rel32(site, body);
    inner.buffer.append(&e.bytes);
    inner.stats.host_bytes += e.len() as u64;
    let (at, end) = (at as u32, (at + e.len()) as u32);
    // It has marks of its own; it is found by host address only.
    inner.blocks.push(Block {
        start,
        pages: [u64::MAX; 2],
        at,
        end,
        body: at,
        landing: None,
        marks: marks.into(),
        incoming: Vec::new(),
        live: false,
    });
    register(inner, b, Landing { at: at + l.at, next: at + l.next });
}

/// Enters the landing of block `b` in the table.
fn register(inner: &mut Inner, b: u32, l: Landing) {
    let block = &mut inner.blocks[b as usize];
    block.landing = Some(l);
    let bucket = block.start as u16;
    inner.buckets.entry(bucket).or_default().insert(0, l);
    inner.stats.landings += 1;
    chain(inner, bucket);
}

/// Sets the table entry and the jumps from landing to landing.
fn chain(inner: &mut Inner, bucket: u16) {
    let list = inner.buckets.get(&bucket).map_or(&[][..], Vec::as_slice);
    let miss = inner.miss as usize;
    // From the last to the first, so that a thread on its way never finds a dead end.
    for (i, l) in list.iter().enumerate().rev() {
        let next = list.get(i + 1).map_or(miss, |n| n.at as usize);
        inner.buffer.patch(l.next as usize, next);
    }
    inner.buffer.set_target(bucket, list.first().map_or(miss, |l| l.at as usize));
}

const _: () = assert!(TABLE_ENTRIES == 1 << 16);

//! Clusters of kept translations: taken over where their pages are the same, left out where they are not, linked as if made now.

use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::mem::PAGE_SIZE;
use bivisor_translator::block::{CodeSource, Opened, Scratch};
use bivisor_translator::cache::Via;
use bivisor_translator::persist::Archive;
use bivisor_translator::{Cache, Policy};
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

const BASE: u64 = 0x5555_0000_0000;
const BLOCKS: u64 = 30;
/// Where the address of a branch through memory lies, from the base.
const SLOT: u64 = 0x9008;

/// A file mapped at some place, with a page of addresses behind it.
#[derive(Clone)]
struct Text {
    base: u64,
    pages: BTreeMap<u64, [u8; PAGE_SIZE as usize]>,
    /// What is in [`SLOT`]: nobody can write there.
    target: Option<u64>,
}

/// Blocks take turns in three pages.
fn distance(block: u64) -> u64 {
    block % 3 * PAGE_SIZE + block / 3 * 64
}

impl Text {
    /// Each block says its number and jumps to the next; the one after the last jumps through memory.
    fn at(base: u64) -> Text {
        let mut text = Text { base, pages: BTreeMap::new(), target: None };
        (0..3).for_each(|p| _ = text.pages.insert(base + p * PAGE_SIZE, [0xcc; PAGE_SIZE as usize]));
        for n in 0..BLOCKS {
            let jump = distance(n + 1).wrapping_sub(distance(n) + 10) as u32;
            let code = [&[0xb8][..], &(n as u32).to_le_bytes(), &[0xe9], &jump.to_le_bytes()].concat();
            text.put(distance(n), &code);
        }
        let code = [&[0xff, 0x25][..], &((SLOT - distance(BLOCKS) - 6) as u32).to_le_bytes()].concat();
        text.put(distance(BLOCKS), &code);
        text
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let page = self.pages.get_mut(&(self.base + at / PAGE_SIZE * PAGE_SIZE)).expect("a page");
        page[(at % PAGE_SIZE) as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn block(&self, n: u64) -> u64 {
        self.base + distance(n)
    }
}

impl CodeSource for Text {
    fn open(&mut self, at: u64) -> Opened {
        if self.file(at).is_some() { Opened::Watched } else { Opened::No }
    }
    fn read(&mut self, at: u64, to: &mut [u8]) -> bool {
        let Some(page) = self.pages.get(&(at / PAGE_SIZE * PAGE_SIZE)) else { return false };
        let from = &page[(at % PAGE_SIZE) as usize..];
        let n = from.len().min(to.len());
        to[..n].copy_from_slice(&from[..n]);
        true
    }
    fn epoch(&self) -> u64 {
        0
    }
    fn file(&self, at: u64) -> Option<u64> {
        self.pages.contains_key(&(at / PAGE_SIZE * PAGE_SIZE)).then_some(self.base)
    }
    fn constant(&mut self, at: u64) -> Option<u64> {
        self.target.filter(|_| at == self.base + SLOT)
    }
}

struct Run {
    cache: Arc<Cache>,
    text: Text,
    scratch: Scratch,
}

impl Run {
    fn new(text: &Text, kept: Option<Vec<u8>>) -> Run {
        let cache = Cache::new(Arc::new(CpuModel::host()), Policy::default(), 1 << 20).expect("executable memory");
        let archive = kept.map(|bytes| Archive::read(bytes, b"key").expect("whole"));
        cache.remember(archive.unwrap_or_default().into());
        Run { cache, text: text.clone(), scratch: Scratch::default() }
    }

    fn go(&mut self, blocks: Range<u64>) -> &mut Run {
        for n in blocks {
            let at = self.text.block(n);
            assert!(self.cache.resolve(&mut self.text, at, Via::Start, &mut self.scratch).is_some(), "block {n}");
        }
        self
    }

    fn keep(&self) -> Vec<u8> {
        self.cache.keep(b"key").expect("much that is new")
    }

    /// Blocks taken over, instructions translated.
    fn counts(&self) -> (u64, u64) {
        let stats = self.cache.stats();
        (stats.adopted, stats.insns)
    }

    /// Host addresses of a block's code, and where its jump leads.
    fn code(&self, n: u64) -> Option<(Range<u64>, u64)> {
        let (at, bytes) = self.cache.code(self.text.block(n))?;
        if n < BLOCKS {
            let number = [&[0xb8][..], &(n as u32).to_le_bytes()].concat();
            assert!(bytes.windows(5).any(|w| w == number), "block {n} is another: {bytes:02x?}");
        }
        let mut all = Decoder::with_ip(64, &bytes, at, DecoderOptions::NONE).into_iter();
        let jump = all.find(|i| i.flow_control() == FlowControl::UnconditionalBranch)?;
        Some((at..at + bytes.len() as u64, jump.near_branch_target()))
    }

    /// Does the jump of a block lead to the next one? If not, to its stub.
    fn leads_on(&self, n: u64) -> bool {
        let (_, to) = self.code(n).expect("a block");
        let next = self.code(n + 1).is_some_and(|(next, _)| next.contains(&to));
        assert!(next || (self.cache.range().1 - PAGE_SIZE..self.cache.range().1).contains(&to), "block {n}");
        next
    }
}

/// What a run has left that executed these blocks.
fn left_by(blocks: Range<u64>) -> Vec<u8> {
    Run::new(&Text::at(BASE), None).go(blocks).keep()
}

#[test]
fn one_block_brings_all_that_were_executed_with_it() {
    let kept = left_by(0..BLOCKS);
    for base in [BASE, BASE + 0x7_1234_5000, BASE - 0x5000] {
        let mut run = Run::new(&Text::at(base), Some(kept.clone()));
        run.go(17..18);
        assert_eq!(run.counts(), (BLOCKS, 0), "at {base:#x}");
        assert!((0..BLOCKS - 1).all(|n| run.leads_on(n)));
        assert!(!run.leads_on(BLOCKS - 1));
        run.go(0..BLOCKS);
        assert_eq!(run.counts(), (BLOCKS, 0));
    }
}

#[test]
fn a_page_that_has_changed_is_left_out_and_so_is_one_that_is_not_there() {
    let kept = left_by(0..BLOCKS);
    let mut changed = Text::at(BASE);
    changed.put(PAGE_SIZE + 4000, &[0x90]);
    let mut gone = Text::at(BASE);
    gone.pages.remove(&(BASE + PAGE_SIZE));
    for text in [changed, gone] {
        let mut run = Run::new(&text, Some(kept.clone()));
        run.go(0..1);
        assert_eq!(run.counts(), (BLOCKS - BLOCKS / 3, 0));
        for n in (0..BLOCKS).filter(|n| n % 3 != 1) {
            assert_eq!(run.leads_on(n), n % 3 == 2 && n + 1 < BLOCKS, "block {n}");
        }
        assert!(run.code(1).is_none());
    }
    // Another instruction where there was one.
    let mut changed = Text::at(BASE);
    changed.put(distance(4), &[0xb8, 99]);
    let mut run = Run::new(&changed, Some(kept));
    run.go(0..BLOCKS);
    assert_eq!(run.counts(), (BLOCKS - BLOCKS / 3, 2 * BLOCKS / 3));
    let (_, code) = run.cache.code(changed.block(4)).expect("a block");
    assert!(code.windows(2).any(|w| w == [0xb8, 99]));
}

#[test]
fn what_becomes_stale_is_unlinked_block_by_block() {
    let mut run = Run::new(&Text::at(BASE), Some(left_by(0..BLOCKS)));
    run.go(0..1);
    run.cache.stale(BASE + 2 * PAGE_SIZE);
    for n in 0..BLOCKS {
        assert_eq!(run.code(n).is_some(), n % 3 != 2, "block {n}");
        assert!(n % 3 == 2 || run.leads_on(n) == (n % 3 == 0), "block {n}");
    }
    // It is there once: what is wanted again is made.
    run.go(0..BLOCKS);
    assert_eq!(run.counts(), (BLOCKS, 2 * BLOCKS / 3));
}

#[test]
fn after_everything_was_thrown_away_it_comes_again() {
    let mut run = Run::new(&Text::at(BASE), Some(left_by(0..BLOCKS)));
    for times in 1..4 {
        run.go(5..6);
        assert_eq!(run.counts(), (times * BLOCKS, 0));
        assert!((0..BLOCKS - 1).all(|n| run.leads_on(n)));
        run.cache.flush(run.cache.flushes());
        assert!(run.code(5).is_none());
    }
}

#[test]
fn a_block_of_two_clusters_is_there_once() {
    let first = Archive::read(left_by(0..20), b"key").expect("whole");
    let mut second = Run::new(&Text::at(BASE), None);
    second.go(10..BLOCKS);
    let second = Archive::read(second.keep(), b"key").expect("whole");
    let bytes = |a: &Archive| (0..a.clusters()).map(|i| a.cluster(i).expect("whole").1.to_vec()).collect::<Vec<_>>();
    let both = Archive::write(b"key", &[bytes(&first), bytes(&second)].concat(), &Archive::default()).expect("room");
    let mut run = Run::new(&Text::at(BASE), Some(both));
    run.go(0..1).go(BLOCKS - 1..BLOCKS);
    assert_eq!(run.counts(), (BLOCKS, 0));
    assert!((20..BLOCKS - 1).all(|n| run.leads_on(n)));
    assert!((0..19).all(|n| run.leads_on(n)));
    run.cache.stale(BASE);
    assert!((0..BLOCKS).filter(|n| n % 3 == 2).all(|n| !run.leads_on(n)));
}

#[test]
fn a_branch_through_memory_leads_where_it_does_now() {
    let mut text = Text::at(BASE);
    text.target = Some(text.block(3));
    let kept = Run::new(&text, None).go(0..BLOCKS + 1).keep();
    let mut moved = Text::at(BASE + 0x1000_0000);
    for target in [3, 11] {
        moved.target = Some(moved.block(target));
        let mut run = Run::new(&moved, Some(kept.clone()));
        run.go(0..BLOCKS + 1);
        assert_eq!(run.counts(), (BLOCKS + 1, 0));
        let (_, to) = run.code(BLOCKS).expect("a block");
        assert!(run.code(target).is_some_and(|(there, _)| there.contains(&to)), "to block {target}");
        run.cache.stale(moved.base + SLOT / PAGE_SIZE * PAGE_SIZE);
        assert!(run.code(BLOCKS).is_none() && run.code(0).is_some());
    }
    // It can be written now.
    moved.target = None;
    let mut run = Run::new(&moved, Some(kept));
    run.go(0..BLOCKS + 1);
    assert_eq!(run.counts(), (BLOCKS, 1));
}

#[test]
fn what_children_have_used_is_prepared_for_the_next_where_it_is_the_same() {
    let kept = left_by(0..BLOCKS);
    let archive = Arc::new(Archive::read(kept.clone(), b"key").expect("whole"));
    for (changed, moved) in [(false, 0), (true, 0), (false, PAGE_SIZE)] {
        let mut child = Run::new(&Text::at(BASE), Some(kept.clone()));
        let used = child.go(3..4).cache.used();
        assert_eq!(used.len(), 1);
        // A parent that has something of its own elsewhere.
        let mut parent = Run::new(&Text::at(BASE + (1 << 32)), None);
        parent.go(0..2);
        parent.cache.prepare(&archive, &used);
        assert_eq!(parent.cache.stats().adopted, 0);
        assert!(parent.go(0..2).code(0).is_some());
        // What another child of it would do.
        let mut text = Text::at(BASE + moved);
        if changed {
            text.put(4000, &[0x90]);
        }
        parent.cache.start_over(&[]);
        parent.cache.remember(archive.clone());
        parent.text = text;
        let before = parent.cache.stats();
        parent.go(0..1);
        let prepared = !changed && moved == 0;
        let made = parent.cache.stats();
        assert_eq!((made.adopted > 0, made.insns > before.insns), (!prepared && !changed, changed));
        assert!(!prepared || (0..BLOCKS - 1).all(|n| parent.leads_on(n)));
        parent.go(0..BLOCKS);
        assert!((0..BLOCKS).all(|n| parent.code(n).is_some()));
    }
}

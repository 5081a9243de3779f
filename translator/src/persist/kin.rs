//! What children execute: each tells its parent which clusters it has used and where. What two of one program have used alike the
//! parent takes over itself and [parks](crate::persist::park), so that those to come have it from birth, in memory that all share.
//!
//! Nothing that is told is believed: clusters are sound or are none, and what is parked is looked at before it is used.

use crate::code_buffer::SharedWords;
use crate::persist::Archive;
use crate::persist::hash::sum;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

/// Programs that a parent takes over code for.
const PROGRAMS: usize = 8;
/// Words of the longest path, clusters that can be told.
const PATH: usize = 128;
const CLUSTERS: usize = 1024;
/// Where what is in a board: its state, programs that need not be told, the archive, lengths of path and list, the path, the list.
const STATE: usize = 0;
const KNOWN: usize = 1;
const STAMP: usize = KNOWN + PROGRAMS;
const LENGTHS: usize = STAMP + 1;
const NAME: usize = LENGTHS + 2;
const LIST: usize = NAME + PATH;
const WORDS: usize = LIST + 3 * CLUSTERS;

/// States of a board.
const FREE: u64 = 0;
const WRITING: u64 = 1;
const WRITTEN: u64 = 2;

/// Finds what is kept for a program.
pub type Librarian = Arc<dyn Fn(&Path) -> Option<Arc<Archive>> + Send + Sync>;

/// A cluster that was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Its number.
    pub cluster: u32,
    /// By how much its blocks lie further on than they did.
    pub move_by: u64,
    /// Where its mapping begins.
    pub mapping: u64,
}

/// What a child tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The program.
    pub program: PathBuf,
    /// [`Archive::stamp`] of what was kept for it.
    pub stamp: u64,
    /// What it has used of that.
    pub used: Vec<Used>,
}

/// Where children tell their parent.
pub struct Board(SharedWords);

fn hash(program: &Path) -> u64 {
    sum(program.as_os_str().as_bytes())[0] | 1
}

impl Board {
    /// Nothing is told.
    pub fn new() -> Option<Board> {
        SharedWords::new(WORDS).ok().map(Board)
    }

    fn known(&self, program: u64) -> bool {
        self.0.all()[KNOWN..STAMP].iter().any(|w| w.load(Relaxed) == program)
    }

    /// Tells, unless it need not be told, is too much, or somebody else has something to tell.
    pub fn tell(&self, told: impl FnOnce() -> Option<Told>, program: &Path) {
        let words = self.0.all();
        if self.known(hash(program)) || words[STATE].compare_exchange(FREE, WRITING, AcqRel, Relaxed).is_err() {
            return;
        }
        let name = program.as_os_str().as_bytes();
        let Some(told) = told().filter(|t| name.len() <= PATH * 8 && t.used.len() <= CLUSTERS) else {
            words[STATE].store(FREE, Release);
            return;
        };
        words[STAMP].store(told.stamp, Relaxed);
        words[LENGTHS].store(name.len() as u64, Relaxed);
        words[LENGTHS + 1].store(told.used.len() as u64, Relaxed);
        for (to, bytes) in words[NAME..].iter().zip(name.chunks(8)) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            to.store(u64::from_le_bytes(word), Relaxed);
        }
        for (to, u) in words[LIST..].chunks(3).zip(&told.used) {
            to.iter().zip([u.cluster.into(), u.move_by, u.mapping]).for_each(|(to, v)| to.store(v, Relaxed));
        }
        words[STATE].store(WRITTEN, Release);
    }

    /// What was told, if anything was; more can be told then.
    pub fn take(&self) -> Option<Told> {
        let words = self.0.all();
        let word = |i: usize| words[i].load(Relaxed);
        if words[STATE].load(Acquire) != WRITTEN {
            return None;
        }
        let (len, count) = ((word(LENGTHS) as usize).min(PATH * 8), (word(LENGTHS + 1) as usize).min(CLUSTERS));
        let name: Vec<u8> = (0..len.div_ceil(8)).flat_map(|i| word(NAME + i).to_le_bytes()).take(len).collect();
        let used = |i: usize| {
            let at = LIST + 3 * i;
            Used { cluster: word(at) as u32, move_by: word(at + 1), mapping: word(at + 2) }
        };
        let told =
            Told { program: OsStr::from_bytes(&name).into(), stamp: word(STAMP), used: (0..count).map(used).collect() };
        words[STATE].store(FREE, Release);
        Some(told)
    }

    /// This program need not be told any more. False if there are too many.
    pub fn know(&self, program: &Path) -> bool {
        let free = self.0.all()[KNOWN..STAMP].iter().find(|w| w.load(Relaxed) == 0);
        free.is_some_and(|w| {
            w.store(hash(program), Relaxed);
            true
        })
    }
}

/// What a process knows of its parent and its children.
#[derive(Default)]
pub struct Kin {
    /// Where its parent is told.
    pub parent: Option<Board>,
    /// Where it is told itself.
    pub children: Option<Board>,
    /// What was told last.
    heard: Option<Told>,
    /// Finds what is kept for what they execute.
    pub librarian: Option<Librarian>,
}

impl Kin {
    /// Before a fork: what is to be prepared, and from what.
    pub fn before_fork(&mut self) -> Option<(Arc<Archive>, Vec<Used>)> {
        let librarian = self.librarian.as_ref()?;
        if self.children.is_none() {
            self.children = Board::new();
        }
        let board = self.children.as_ref()?;
        let now = board.take()?;
        let Some(before) = self.heard.take().filter(|b| b.program == now.program && b.stamp == now.stamp) else {
            self.heard = Some(now);
            return None;
        };
        let both = now.used.iter().filter(|u| before.used.contains(u)).copied().collect();
        let archive = librarian(&now.program).filter(|a| a.stamp() == now.stamp)?;
        board.know(&now.program).then_some((archive, both))
    }

    /// In a forked child.
    pub fn after_fork(&mut self) {
        self.parent = self.children.take();
        self.heard = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_tell_alike_is_known_then() {
        let board = Board::new().expect("memory");
        let program = Path::new("/usr/bin/a program");
        let used = |cluster| Used { cluster, move_by: 0u64.wrapping_sub(0x1000), mapping: 0x7f00_0000_0000 };
        let told = |n| Told { program: program.into(), stamp: 7, used: (0..n).map(used).collect() };
        assert_eq!(board.take(), None);
        board.tell(|| Some(told(3)), program);
        board.tell(|| Some(told(4)), program);
        assert_eq!(board.take(), Some(told(3)));
        board.tell(|| Some(told(CLUSTERS as u32 + 1)), program);
        board.tell(|| None, program);
        assert_eq!(board.take(), None);
        assert!((0..PROGRAMS).all(|i| board.know(Path::new(&format!("other {i}"))) == (i < PROGRAMS)));
        assert!(!board.know(program));
        let board = Board::new().expect("memory");
        assert!(board.know(program));
        board.tell(|| Some(told(1)), program);
        assert_eq!(board.take(), None);
    }

    #[test]
    fn a_parent_prepares_what_came_twice() {
        let program = Path::new("p");
        let archive = Arc::new(Archive::default());
        let found = archive.clone();
        let mut kin = Kin { librarian: Some(Arc::new(move |_| Some(found.clone()))), ..Kin::default() };
        assert!(kin.before_fork().is_none());
        let used = |cluster, move_by| Used { cluster, move_by, mapping: 0x1000 };
        let told = |used| Told { program: program.into(), stamp: archive.stamp(), used };
        let tell = |kin: &mut Kin, used: Vec<Used>| {
            kin.children.as_ref().expect("a board").tell(|| Some(told(used)), program);
            kin.before_fork().map(|(_, used)| used)
        };
        assert_eq!(tell(&mut kin, vec![used(1, 0), used(2, 0x1000), used(3, 0)]), None);
        assert_eq!(tell(&mut kin, vec![used(1, 0), used(2, 0x5000)]), Some(vec![used(1, 0)]));
        assert_eq!(tell(&mut kin, vec![used(1, 0)]), None);
    }
}

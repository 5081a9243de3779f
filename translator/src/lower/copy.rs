//! Innocuous instructions: the guest's own bytes.

use crate::block::Item;
use crate::lower::{Lowering, memory};
use crate::marks::What;

/// Copies an instruction; false if its memory operand cannot be emitted.
pub(crate) fn copy(l: &mut Lowering<'_>, item: &Item) -> bool {
    if memory::can_stay(l, item) {
        l.mark(What::Copied(item.at));
        let block = l.block;
        l.e.bytes.extend_from_slice(block.code(item));
        return true;
    }
    memory::rewrite(l, item)
}

//! Reading a load before its commit: by whoever made it, and nobody else.

use crate::load::Loaded;
use crate::source::Source;
use crate::sst::{Purpose, SstIter};
use crate::{Result, Seqno, full_key};

impl Loaded {
    /// Calls `f` with the value of `key`, if it has one.
    pub fn get<R>(&self, key: &[u8], f: impl FnOnce(&[u8]) -> R) -> Result<Option<R>> {
        let key = full_key(self.tree(), key);
        let Some(sst) = self.ssts().iter().find(|sst| *sst.first_key <= key[..] && key[..] <= *sst.last_key)
        else {
            return Ok(None);
        };
        let mut iter = SstIter::new(self.engine().store.open(sst)?.clone(), Purpose::Query);
        iter.seek(&key, Seqno(u64::MAX))?;
        Ok((iter.valid() && iter.key() == key).then(|| f(iter.value())))
    }

    /// Calls `each` with key and value of all rows in order.
    pub fn read(&self, mut each: impl FnMut(&[u8], &[u8]) -> Result<()>) -> Result<()> {
        let least = full_key(self.tree(), &[]);
        for sst in self.ssts() {
            let mut iter = SstIter::new(self.engine().store.open(sst)?.clone(), Purpose::Compaction);
            iter.seek(&least, Seqno(u64::MAX))?;
            while iter.valid() {
                each(&iter.key()[least.len()..], iter.value())?;
                iter.next()?;
            }
        }
        Ok(())
    }
}

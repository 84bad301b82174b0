//! The catalogue's door: tables by path, DDL steps, and the small files that the server keeps beside its tables.
//!
//! A *path* is `database/table` in the server's file-name encoding; a leading `./` is ignored. Every call is one engine
//! transaction, durable when it returns; none takes part in a session's transaction.
//!
//! * A definition and the trees that it names appear and vanish in one commit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use engine::{Cursor, Engine, LockMode, LockWait, ReadAs, Seqno, TreeId, Txn};
use parking_lot::Mutex;

use crate::backup::{self, Settled};
use crate::catalogue::{CATALOGUE, FORMAT, Space, Trees, first_part_key, key, mark_key, table_key};
use crate::indexes::{BuiltIndex, BuiltIndexes};
use crate::keys::Extent;
use crate::layout::Layout;
use crate::session::Counts;
use crate::table::{TableState, path_key};
use crate::{Collations, Definition, Descriptor, Error, Result, Session, Table};

/// How long a DDL step waits for another one on the same name.
const DDL_WAIT: Duration = Duration::from_secs(50);

/// The images that the server needs to recognise a table.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableImages<'a> {
    /// The .frm image.
    pub frm: &'a [u8],
    /// The .par image, or nothing.
    pub par: &'a [u8],
}

/// All tables of one engine.
pub struct Store {
    engine: Arc<Engine>,
    collations: Arc<dyn Collations>,
    states: Mutex<BTreeMap<u64, Arc<TableState>>>,
    rows_spared: AtomicU64,
}

impl Store {
    /// Opens the catalogue, making it in a fresh engine; an unknown catalogue format is refused by name.
    pub fn open(engine: Arc<Engine>, collations: Arc<dyn Collations>) -> Result<Arc<Store>> {
        let store = Arc::new(Self {
            engine,
            collations,
            states: Mutex::new(BTreeMap::new()),
            rows_spared: AtomicU64::new(0),
        });
        let format_key = key(Space::Format, &[]);
        let format =
            store.read(|txn| Ok(txn.get(CATALOGUE, &format_key, ReadAs::Newest, <[u8]>::to_vec)?))?;
        match format {
            Some(format) if format == FORMAT => {}
            Some(other) => {
                return Err(Error::Corrupt(format!(
                    "the catalogue has format {:?}; this program knows {:?}",
                    String::from_utf8_lossy(&other),
                    String::from_utf8_lossy(FORMAT)
                )));
            }
            None => store.change(|txn| Ok(txn.put(CATALOGUE, &format_key, FORMAT)?))?,
        }
        store.tell_stored_first_parts()?;
        Ok(store)
    }
    /// Writes exact row counts of all tables that were used. Call before the engine is closed.
    pub fn close(&self) -> Result<()> {
        let states: Vec<_> = self.states.lock().values().cloned().collect();
        self.change(|txn| {
            for state in states.iter().filter(|state| state.is_recovered()) {
                let statistics = state.stored_statistics(&Counts::default()).encode();
                txn.put(CATALOGUE, &table_key(Space::Statistics, state.id), &statistics)?;
            }
            Ok(())
        })
    }
    /// The engine below.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }
    pub(crate) fn collations(&self) -> &dyn Collations {
        &*self.collations
    }
    /// Rows that were not fetched since the start because a condition on their index entry ruled them out.
    pub fn rows_spared(&self) -> u64 {
        self.rows_spared.load(Relaxed)
    }
    pub(crate) fn note_spared(&self, rows: u64) {
        if rows != 0 {
            self.rows_spared.fetch_add(rows, Relaxed);
        }
    }

    /// Makes an empty table. `auto_increment` is the first value handed out (0 is taken as 1).
    pub fn create(
        &self,
        path: &str,
        descriptor: &Descriptor,
        images: TableImages,
        auto_increment: u64,
    ) -> Result<()> {
        descriptor.check()?;
        let path = normal(path);
        let layout = Layout::new(descriptor.clone(), self.collations());
        let trees = self.allocate(descriptor);
        let definition = Definition {
            table: u64::from(trees.primary.0),
            version: 1,
            frm: images.frm.to_vec(),
            par: images.par.to_vec(),
            fingerprint: layout.fingerprint(),
            trees,
        };
        self.change(|txn| {
            if self.locked_definition(txn, path)?.is_some() {
                return Err(Error::TableExists(path.to_owned()));
            }
            claim(txn, &definition.trees)?;
            put_first_parts(txn, &layout, &definition.trees)?;
            txn.put(CATALOGUE, &path_key(path), &definition.encode())?;
            if auto_increment > 1 {
                let key = mark_key(definition.table, 0);
                txn.put(CATALOGUE, &key, &auto_increment.to_le_bytes())?;
            }
            Ok(())
        })?;
        self.tell_first_parts(&layout, &definition.trees);
        Ok(())
    }
    /// Removes a table: gone when it returns, its space comes back later.
    pub fn drop_table(&self, path: &str) -> Result<()> {
        let path = normal(path);
        let dropped = self.change(|txn| self.drop_in(txn, path))?;
        self.forget(&[dropped]);
        Ok(())
    }
    /// Renames a table, to another database too. Statistics and counters stay.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (normal(from), normal(to));
        self.change(|txn| {
            let definition =
                self.locked_definition(txn, from)?.ok_or_else(|| Error::NoSuchTable(from.to_owned()))?;
            if self.locked_definition(txn, to)?.is_some() {
                return Err(Error::TableExists(to.to_owned()));
            }
            move_in(txn, from, to, &definition)
        })
    }
    /// Puts new images in place of the old (in-place ALTER, partition metadata); rows are not touched, so the stored layout
    /// that follows from `descriptor` must be the old one.
    pub fn set_images(&self, path: &str, descriptor: &Descriptor, images: TableImages) -> Result<()> {
        descriptor.check()?;
        let path = normal(path);
        let fingerprint = Layout::new(descriptor.clone(), self.collations()).fingerprint();
        self.change(|txn| {
            let mut definition =
                self.locked_definition(txn, path)?.ok_or_else(|| Error::NoSuchTable(path.to_owned()))?;
            check_fingerprint(path, &definition, fingerprint)?;
            definition.version += 1;
            definition.frm = images.frm.to_vec();
            definition.par = images.par.to_vec();
            Ok(txn.put(CATALOGUE, &path_key(path), &definition.encode())?)
        })
    }
    /// Gives a table the indexes that were built for it, and new images. Durable when it returns, or nothing has changed. Nobody reads the table
    /// meanwhile; it has to be opened again.
    pub fn set_indexes(&self, table: &Table, images: TableImages, built: BuiltIndexes) -> Result<()> {
        let path = table.path.as_str();
        let BuiltIndexes { layout, trees, built, fresh, .. } = built;
        let (seqno, (gone, builds)) = self.change_at(|txn| {
            let mut definition =
                self.locked_definition(txn, path)?.ok_or_else(|| Error::NoSuchTable(path.to_owned()))?;
            check_fingerprint(path, &definition, table.layout.fingerprint())?;
            let builds = !built.is_empty();
            for index in built {
                match index {
                    BuiltIndex::Loaded(loaded) => txn.add_loaded(loaded)?,
                    BuiltIndex::Few(tree, entries) => {
                        txn.delete(tree, &[])?;
                        entries.iter().try_for_each(|(key, value)| txn.put(tree, key, value))?;
                    }
                }
            }
            let gone: Vec<_> =
                definition.trees.all().filter(|tree| !trees.all().any(|t| t == *tree)).collect();
            gone.iter().try_for_each(|tree| drop_tree(txn, *tree))?;
            put_first_parts(txn, &layout, &trees)?;
            definition.version += 1;
            definition.frm = images.frm.to_vec();
            definition.par = images.par.to_vec();
            definition.fingerprint = layout.fingerprint();
            definition.trees = trees.clone();
            txn.put(CATALOGUE, &path_key(path), &definition.encode())?;
            let statistics = table.state.stored_rows().encode();
            txn.put(CATALOGUE, &table_key(Space::Statistics, definition.table), &statistics)?;
            Ok((gone, builds))
        })?;
        fresh.keep();
        gone.iter().for_each(|tree| self.engine.forget_first_part(*tree));
        let since = if builds { seqno } else { Seqno(0) };
        let state = Arc::new(table.state.with_indexes(&trees, since));
        self.states.lock().insert(state.id, state);
        Ok(())
    }
    /// What the catalogue knows of a table; `None` if there is no such table.
    pub fn definition(&self, path: &str) -> Result<Option<Definition>> {
        let path = normal(path);
        self.read(|txn| definition_in(txn, path))
    }
    /// Whether there is such a table.
    pub fn exists(&self, path: &str) -> Result<bool> {
        let key = path_key(normal(path));
        self.read(|txn| Ok(txn.get(CATALOGUE, &key, ReadAs::Newest, |_| ())?.is_some()))
    }
    /// Calls `each` with the file name (no directory) of every table in a database, in order; `#sql…` and `#P#` ones too.
    pub fn list(&self, database: &str, each: &mut dyn FnMut(&str)) -> Result<()> {
        let prefix = directory(normal(database));
        self.walk(Space::Table, prefix.as_bytes(), |path, _| {
            each(path.strip_prefix(&prefix).unwrap_or(path));
            Ok(())
        })
    }
    /// Names of all databases that hold a table or a file, in order.
    pub fn databases(&self) -> Result<Vec<String>> {
        let mut names = std::collections::BTreeSet::new();
        for space in [Space::Table, Space::File] {
            self.walk(space, b"", |path, _| {
                if let Some((database, _)) = path.split_once('/')
                    && !names.contains(database)
                {
                    names.insert(database.to_owned());
                }
                Ok(())
            })?;
        }
        Ok(names.into_iter().collect())
    }
    /// Drops every table whose path starts with `database/` and forgets its files: DROP DATABASE.
    pub fn drop_database(&self, database: &str) -> Result<()> {
        let prefix = directory(normal(database));
        let (mut tables, mut files) = (Vec::new(), Vec::new());
        self.walk(Space::Table, prefix.as_bytes(), |path, _| {
            tables.push(path.to_owned());
            Ok(())
        })?;
        self.walk(Space::File, prefix.as_bytes(), |name, _| {
            files.push(name.to_owned());
            Ok(())
        })?;
        let dropped = self.change(|txn| {
            for file in &files {
                txn.delete(CATALOGUE, &key(Space::File, file.as_bytes()))?;
            }
            tables.iter().map(|path| self.drop_in(txn, path)).collect::<Result<Vec<_>>>()
        })?;
        self.forget(&dropped);
        Ok(())
    }

    /// Opens a table for reading and writing. Cheap; one for each handler is fine.
    pub fn open_table(self: &Arc<Self>, path: &str, descriptor: Descriptor) -> Result<Arc<Table>> {
        descriptor.check()?;
        let path = normal(path);
        let definition = self.definition(path)?.ok_or_else(|| Error::NoSuchTable(path.to_owned()))?;
        let layout = Layout::new(descriptor, self.collations());
        check_fingerprint(path, &definition, layout.fingerprint())?;
        self.tell_first_parts(&layout, &definition.trees);
        let state = Arc::clone(
            self.states
                .lock()
                .entry(definition.table)
                .or_insert_with(|| Arc::new(TableState::new(definition.table, &definition.trees))),
        );
        let table = Table::new(Arc::clone(self), path.to_owned(), layout, state, &definition);
        table.recover_counters()?;
        Ok(Arc::new(table))
    }
    /// A connection's session. `interrupted` is polled during lock waits (thd_kill_level).
    pub fn session(self: &Arc<Self>, interrupted: Box<dyn Fn() -> bool + Send + Sync>) -> Session {
        Session::new(Arc::clone(self), Arc::from(interrupted))
    }

    /// Keeps a file under its path relative to the data directory (`shop/db.opt`, `shop/v.frm`, `shop/t.TRG`, `shop/p.par`).
    pub fn file_put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.files_apply(&[(name, Some(bytes))])
    }
    /// Several at once, in one transaction: `None` removes.
    pub fn files_apply(&self, changes: &[(&str, Option<&[u8]>)]) -> Result<()> {
        self.change(|txn| {
            for (name, bytes) in changes {
                let key = key(Space::File, normal(name).as_bytes());
                match bytes {
                    Some(bytes) => txn.put(CATALOGUE, &key, bytes)?,
                    None => txn.delete(CATALOGUE, &key)?,
                }
            }
            Ok(())
        })
    }
    /// Its bytes.
    pub fn file_get(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let key = key(Space::File, normal(name).as_bytes());
        self.read(|txn| Ok(txn.get(CATALOGUE, &key, ReadAs::Newest, <[u8]>::to_vec)?))
    }
    /// Forgets a file; an absent one is fine.
    pub fn file_remove(&self, name: &str) -> Result<()> {
        self.files_apply(&[(name, None)])
    }
    /// Calls `each` with name and bytes of every file under `directory` (all with `""`), in order.
    pub fn files(&self, under: &str, each: &mut dyn FnMut(&str, &[u8])) -> Result<()> {
        let prefix = if under.is_empty() { String::new() } else { directory(normal(under)) };
        self.walk(Space::File, prefix.as_bytes(), |name, bytes| {
            each(name, bytes);
            Ok(())
        })
    }

    /// Ends every ALTER TABLE that died between its renames and that the server knows nothing of any more: the altered table stays if it got
    /// its name, otherwise the old one gets its name back. Returns what was done.
    pub fn settle_backups(&self) -> Result<Vec<Settled>> {
        let (mut paths, mut origins) = (Vec::new(), BTreeMap::new());
        self.walk(Space::Table, b"", |path, value| {
            if backup::is_backup(path) {
                let definition = Definition::decode(path, value)?;
                origins.insert(path.to_owned(), self.origin(definition.table)?);
            }
            paths.push(path.to_owned());
            Ok(())
        })?;
        let settled = backup::settle(&paths, &origins);
        for end in &settled {
            self.carry_out(end)?;
        }
        Ok(settled)
    }

    /// In one transaction, so that the parts of a table never are of different ages.
    fn carry_out(&self, end: &Settled) -> Result<()> {
        let dropped = self.change(|txn| {
            let dropped = end.drop.iter().map(|path| self.drop_in(txn, path)).collect::<Result<Vec<_>>>()?;
            for (from, to) in &end.rename {
                let definition =
                    self.locked_definition(txn, from)?.ok_or_else(|| Error::NoSuchTable(from.clone()))?;
                move_in(txn, from, to, &definition)?;
            }
            Ok(dropped)
        })?;
        self.forget(&dropped);
        Ok(())
    }

    fn origin(&self, table: u64) -> Result<Option<String>> {
        let key = table_key(Space::Origin, table);
        let name = self.read(|txn| Ok(txn.get(CATALOGUE, &key, ReadAs::Newest, <[u8]>::to_vec)?))?;
        let text = name.map(String::from_utf8).transpose();
        text.map_err(|_| Error::Corrupt("the origin of a table is not UTF-8".to_owned()))
    }

    /// Gives a table new, empty trees.
    pub(crate) fn truncate(&self, path: &str, layout: &Layout) -> Result<Trees> {
        let (old, new) = self.change(|txn| {
            let mut definition =
                self.locked_definition(txn, path)?.ok_or_else(|| Error::NoSuchTable(path.to_owned()))?;
            drop_trees(txn, &definition.trees)?;
            let mut fresh = Trees { primary: self.engine.allocate_tree(), indexes: Vec::new() };
            for index in &definition.trees.indexes {
                fresh.indexes.push(index.map(|_| self.engine.allocate_tree()));
            }
            claim(txn, &fresh)?;
            put_first_parts(txn, layout, &fresh)?;
            let old = std::mem::replace(&mut definition.trees, fresh);
            self.forget_marks(txn, definition.table)?;
            txn.delete(CATALOGUE, &table_key(Space::Statistics, definition.table))?;
            txn.put(CATALOGUE, &path_key(path), &definition.encode())?;
            Ok((old, definition.trees))
        })?;
        old.all().for_each(|tree| self.engine.forget_first_part(tree));
        self.tell_first_parts(layout, &new);
        Ok(new)
    }

    /// Gives a table the trees `fresh`, with rows and all, when `txn` commits. Returns those that it has until then.
    pub(crate) fn exchange_trees(
        &self,
        txn: &mut Txn,
        path: &str,
        layout: &Layout,
        fresh: &Trees,
    ) -> Result<Trees> {
        let mut definition =
            self.locked_definition(txn, path)?.ok_or_else(|| Error::NoSuchTable(path.to_owned()))?;
        drop_trees(txn, &definition.trees)?;
        put_first_parts(txn, layout, fresh)?;
        let old = std::mem::replace(&mut definition.trees, fresh.clone());
        txn.put(CATALOGUE, &path_key(path), &definition.encode())?;
        Ok(old)
    }

    /// Runs `f` in a transaction of its own and commits it.
    pub(crate) fn change<T>(&self, f: impl FnOnce(&mut Txn) -> Result<T>) -> Result<T> {
        self.change_at(f).map(|(_, value)| value)
    }

    /// The same; returns what the commit's seqno is, too.
    fn change_at<T>(&self, f: impl FnOnce(&mut Txn) -> Result<T>) -> Result<(Seqno, T)> {
        let mut txn = self.engine.begin();
        let value = f(&mut txn)?;
        Ok((txn.commit()?, value))
    }

    fn read<T>(&self, f: impl FnOnce(&mut Txn) -> Result<T>) -> Result<T> {
        f(&mut self.engine.begin())
    }

    pub(crate) fn allocate(&self, descriptor: &Descriptor) -> Trees {
        let primary = self.engine.allocate_tree();
        let own = |index| (descriptor.primary != Some(index)).then(|| self.engine.allocate_tree());
        Trees { primary, indexes: (0..descriptor.indexes.len()).map(own).collect() }
    }

    fn locked_definition(&self, txn: &mut Txn, path: &str) -> Result<Option<Definition>> {
        let wait = LockWait { timeout: DDL_WAIT, interrupted: &|| false };
        txn.lock(CATALOGUE, &path_key(path), LockMode::Exclusive, &wait)?;
        definition_in(txn, path)
    }

    fn drop_in(&self, txn: &mut Txn, path: &str) -> Result<Definition> {
        let definition =
            self.locked_definition(txn, path)?.ok_or_else(|| Error::NoSuchTable(path.to_owned()))?;
        drop_trees(txn, &definition.trees)?;
        txn.delete(CATALOGUE, &path_key(path))?;
        self.forget_marks(txn, definition.table)?;
        txn.delete(CATALOGUE, &table_key(Space::Statistics, definition.table))?;
        if backup::is_backup(path) {
            txn.delete(CATALOGUE, &table_key(Space::Origin, definition.table))?;
        }
        Ok(definition)
    }

    /// What is kept in memory of tables that are gone.
    fn forget(&self, dropped: &[Definition]) {
        let mut states = self.states.lock();
        for definition in dropped {
            states.remove(&definition.table);
            definition.trees.all().for_each(|tree| self.engine.forget_first_part(tree));
        }
    }

    pub(crate) fn tell_first_parts(&self, layout: &Layout, trees: &Trees) {
        for (tree, extent) in layout.first_parts(trees) {
            self.engine.set_first_part(tree, Arc::new(extent));
        }
    }

    /// Of tables that nobody has opened yet, too: compaction does not wait for them.
    fn tell_stored_first_parts(&self) -> Result<()> {
        let prefix = key(Space::FirstPart, &[]);
        self.read(|txn| {
            let mut cursor = Cursor::new(&self.engine);
            cursor.open(txn, CATALOGUE, ReadAs::Newest)?;
            let mut more = cursor.seek(txn, &prefix)?;
            while more && let Some(tree) = cursor.key().strip_prefix(&prefix[..]) {
                if let (Ok(tree), Some(extent)) = (tree.try_into(), Extent::decode(cursor.value())) {
                    self.engine.set_first_part(TreeId(u32::from_be_bytes(tree)), Arc::new(extent));
                }
                more = cursor.next(txn)?;
            }
            Ok(())
        })
    }

    /// Calls `each` with key and value of all auto-increment marks of a table.
    pub(crate) fn marks(&self, table: u64, mut each: impl FnMut(&[u8], &[u8]) -> Result<()>) -> Result<()> {
        let prefix = table_key(Space::AutoIncrement, table);
        let mut txn = self.engine.begin();
        let mut cursor = Cursor::new(&self.engine);
        cursor.open(&mut txn, CATALOGUE, ReadAs::Newest)?;
        let mut more = cursor.seek(&mut txn, &prefix)?;
        while more && cursor.key().starts_with(&prefix) {
            each(cursor.key(), cursor.value())?;
            more = cursor.next(&mut txn)?;
        }
        Ok(())
    }

    pub(crate) fn forget_marks(&self, txn: &mut Txn, table: u64) -> Result<()> {
        self.marks(table, |key, _| Ok(txn.delete(CATALOGUE, key)?))
    }

    /// Calls `each` with name and value of all entries of a space that start with `prefix`, in order.
    fn walk(
        &self,
        space: Space,
        prefix: &[u8],
        mut each: impl FnMut(&str, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let prefix = key(space, prefix);
        let mut txn = self.engine.begin();
        let mut cursor = Cursor::new(&self.engine);
        cursor.open(&mut txn, CATALOGUE, ReadAs::Newest)?;
        let mut more = cursor.seek(&mut txn, &prefix)?;
        while more && cursor.key().starts_with(&prefix) {
            let name = std::str::from_utf8(&cursor.key()[1..])
                .map_err(|_| Error::Corrupt("a name in the catalogue is not UTF-8".to_owned()))?;
            each(name, cursor.value())?;
            more = cursor.next(&mut txn)?;
        }
        Ok(())
    }
}

/// Writes to each new tree, although there is nothing to write: a tree id that no commit wrote to may be handed out again after a crash.
fn claim(txn: &mut Txn, trees: &Trees) -> Result<()> {
    for tree in trees.all() {
        txn.delete(tree, &[])?;
    }
    Ok(())
}

/// Gives a table another path. What is put aside remembers where it was.
fn move_in(txn: &mut Txn, from: &str, to: &str, definition: &Definition) -> Result<()> {
    let origin = table_key(Space::Origin, definition.table);
    match (backup::is_backup(from), backup::is_backup(to)) {
        (false, true) => txn.put(CATALOGUE, &origin, from.as_bytes())?,
        (true, false) => txn.delete(CATALOGUE, &origin)?,
        _ => (),
    }
    txn.delete(CATALOGUE, &path_key(from))?;
    Ok(txn.put(CATALOGUE, &path_key(to), &definition.encode())?)
}

fn put_first_parts(txn: &mut Txn, layout: &Layout, trees: &Trees) -> Result<()> {
    for (tree, extent) in layout.first_parts(trees) {
        txn.put(CATALOGUE, &first_part_key(tree), &extent.encode())?;
    }
    Ok(())
}

fn drop_trees(txn: &mut Txn, trees: &Trees) -> Result<()> {
    trees.all().try_for_each(|tree| drop_tree(txn, tree))
}

fn drop_tree(txn: &mut Txn, tree: TreeId) -> Result<()> {
    txn.drop_tree(tree);
    Ok(txn.delete(CATALOGUE, &first_part_key(tree))?)
}

fn definition_in(txn: &mut Txn, path: &str) -> Result<Option<Definition>> {
    txn.get(CATALOGUE, &path_key(path), ReadAs::Newest, |bytes| Definition::decode(path, bytes))?.transpose()
}

fn check_fingerprint(path: &str, definition: &Definition, fingerprint: u64) -> Result<()> {
    if definition.fingerprint != fingerprint {
        let reason = "columns or keys differ from those that it was made with";
        return Err(Error::DefinitionChanged { path: path.to_owned(), reason });
    }
    Ok(())
}

fn normal(path: &str) -> &str {
    path.strip_prefix("./").unwrap_or(path)
}

fn directory(name: &str) -> String {
    format!("{}/", name.trim_end_matches('/'))
}

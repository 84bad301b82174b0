//! Tables that ALTER TABLE put aside. The server copies to `#sql-alter-<session>`, renames the table to `#sql-backup-<session>` and the copy to the
//! table's name, and drops the backup; its own log of that is a file, which may be lost with the machine.
//!
//! * Parts of a partitioned table are put aside one by one: they are of one age before, and after.
//! * Nothing is dropped before all of the copy has its name.

use std::collections::BTreeMap;

const BACKUP: &str = "#sql-backup-";
const COPY: &str = "#sql-alter-";
const PART: &str = "#P#";

/// What ends one ALTER TABLE.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// What the table was put aside as, with its database.
    pub backup: String,
    /// Tables to drop first: the backup's, or what is in its way.
    pub drop: Vec<String>,
    /// Old and new paths.
    pub rename: Vec<(String, String)>,
}

pub(crate) fn is_backup(path: &str) -> bool {
    path.split_once('/').is_some_and(|(_, table)| table.starts_with(BACKUP))
}

/// Decides for each backup among `paths`, which are all there are. `origins` has the backups' former paths; one that is not known is left
/// alone, and reported with nothing to do.
pub(crate) fn settle(paths: &[String], origins: &BTreeMap<String, Option<String>>) -> Vec<Settled> {
    let mut groups: BTreeMap<&str, Vec<(&str, Option<&str>)>> = BTreeMap::new();
    for (backup, origin) in origins {
        groups.entry(whole(backup)).or_default().push((backup, origin.as_deref()));
    }
    groups.into_iter().map(|(backup, parts)| settle_one(paths, backup, &parts)).collect()
}

fn settle_one(paths: &[String], backup: &str, parts: &[(&str, Option<&str>)]) -> Settled {
    let mut end = Settled { backup: backup.to_owned(), ..Settled::default() };
    let known: Option<Vec<(&str, &str)>> =
        parts.iter().map(|(part, origin)| Some((*part, (*origin)?))).collect();
    let Some(known) = known else { return end };
    let table = whole(known[0].1);
    let copy = backup.replacen(BACKUP, COPY, 1);
    let any_of = |name: &str| paths.iter().any(|path| whole(path) == name);
    let partitioned = known[0].1 != table;
    if any_of(table) && !(partitioned && any_of(&copy)) {
        end.drop.extend(known.iter().map(|(part, _)| (*part).to_owned()));
        return end;
    }
    // Parts that stand where others were put aside are the copy's; then all of the backup is here. Otherwise those that have the table's
    // name are parts that were not put aside yet.
    if known.iter().any(|(_, origin)| paths.iter().any(|path| path == origin)) {
        end.drop.extend(paths.iter().filter(|path| whole(path) == table).cloned());
    }
    end.rename.extend(known.iter().map(|(part, origin)| ((*part).to_owned(), (*origin).to_owned())));
    end
}

/// The path without the name of a part.
fn whole(path: &str) -> &str {
    path.split_once(PART).map_or(path, |(table, _)| table)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One line for each end: `+` renamed to, `-` dropped.
    fn ends(paths: &[&str], origins: &[(&str, &str)]) -> String {
        let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        let known = |origin: &str| (!origin.is_empty()).then(|| origin.to_owned());
        let origins = origins.iter().map(|(path, origin)| ((*path).to_owned(), known(origin))).collect();
        let line = |end: &Settled| {
            let drops = end.drop.iter().map(|path| format!(" -{path}"));
            let renames = end.rename.iter().map(|(_, to)| format!(" +{to}"));
            format!("{}:{}", end.backup, drops.chain(renames).collect::<String>())
        };
        settle(&paths, &origins).iter().map(line).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn a_table_gets_its_name_back_unless_the_altered_one_has_it() {
        let backup = ("d/#sql-backup-1-2", "d/t");
        let between = ["d/#sql-backup-1-2", "d/#sql-alter-1-2"];
        assert_eq!(ends(&between, &[backup]), "d/#sql-backup-1-2: +d/t");
        assert_eq!(ends(&["d/#sql-backup-1-2", "e/t"], &[backup]), "d/#sql-backup-1-2: +d/t");
        assert_eq!(ends(&["d/#sql-backup-1-2", "d/t"], &[backup]), "d/#sql-backup-1-2: -d/#sql-backup-1-2");
        let unknown = ("d/#sql-backup-1-2", "");
        assert_eq!(ends(&["d/#sql-backup-1-2", "d/t"], &[unknown]), "d/#sql-backup-1-2:");
    }

    #[test]
    fn parts_of_a_table_stay_of_one_age() {
        let (b0, b1) = ("d/#sql-backup-1-2#P#p0", "d/#sql-backup-1-2#P#p1");
        let (a0, a1) = ("d/#sql-alter-1-2#P#p0", "d/#sql-alter-1-2#P#p1");
        let (t0, t1, t2) = ("d/t#P#p0", "d/t#P#p1", "d/t#P#p2");
        let both = [(b0, t0), (b1, t1)];
        assert_eq!(ends(&[b0, t1, a0, a1], &[(b0, t0)]), "d/#sql-backup-1-2: +d/t#P#p0", "half put aside");
        assert_eq!(
            ends(&[b0, b1, t0, a1], &both),
            "d/#sql-backup-1-2: -d/t#P#p0 +d/t#P#p0 +d/t#P#p1",
            "half of the copy has its name"
        );
        assert_eq!(
            ends(&[b0, b1, t0, t1, t2, a0], &both),
            "d/#sql-backup-1-2: -d/t#P#p0 -d/t#P#p1 -d/t#P#p2 +d/t#P#p0 +d/t#P#p1",
            "the copy has more parts"
        );
        assert_eq!(ends(&[b1, t0, t1], &[(b1, t1)]), format!("d/#sql-backup-1-2: -{b1}"), "half dropped");
    }
}

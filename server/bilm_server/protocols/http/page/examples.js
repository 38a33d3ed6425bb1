// Texts that show what the vectors know; `word` is chosen in the first sentence.

export const EXAMPLES = [
  {
    label: 'bank',
    word: 'bank',
    text: [
      'The bank lent the company two million dollars .',
      'The bank closed its office in the town after the war .',
      'Trees grow along the western bank of the river .',
      'The army crossed to the eastern bank of the river at night .',
      'A village stood on the southern bank of the lake .',
    ],
  },
  {
    label: 'play',
    word: 'play',
    text: [
      'He wrote the play in three weeks and directed it himself .',
      'Critics praised the play for its humour and its music .',
      'The actress returned to the stage in a play about her childhood .',
      'She could not play in the final because of a knee injury .',
      'They will play their next match against a team from Manchester .',
    ],
  },
  {
    label: 'a typo',
    word: 'patietns',
    text: [
      'The hospital treated more than two hundred patietns that night .',
      'The hospital treated more than two hundred patients that night .',
      'The hospital treated more than two hundred soldiers that night .',
    ],
  },
];

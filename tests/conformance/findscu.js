// C-FIND by dcmjs-dimse: a JSON array of {model, cancel, elements} on standard input, one of {status, pending, datasets} on
// standard output.  model is the SOP class; cancel, if it is not 0, is after how many responses a C-CANCEL is sent.
// Arguments: the module's folder, the port, the called AE title.
'use strict';

const [folder, port, called] = process.argv.slice(2);
const { Client, Dataset, log, requests } = require(folder);
const { CFindRequest } = requests;

log.setLevel('silent');

function ask(question) {
  return new Promise((resolve, reject) => {
    const client = new Client();
    const request = new CFindRequest();
    request.setAffectedSopClassUid(question.model);
    request.setDataset(new Dataset({ SpecificCharacterSet: 'ISO_IR 192', ...question.elements }));
    const datasets = [];
    const pending = new Set();
    let status;
    request.on('response', (response) => {
      status = response.getStatus();
      if (response.hasDataset()) {
        pending.add(status);
        datasets.push(response.getDataset().getElements());
        if (datasets.length === question.cancel) client.cancel(request);
      }
    });
    client.addRequest(request);
    client.on('networkError', reject);
    client.on('closed', () => resolve({ status, pending: [...pending], datasets }));
    client.send('127.0.0.1', Number(port), 'DCMJS', called);
  });
}

async function main() {
  const chunks = [];
  for await (const chunk of process.stdin) chunks.push(chunk);
  const answers = [];
  for (const question of JSON.parse(Buffer.concat(chunks))) answers.push(await ask(question));
  process.stdout.write(JSON.stringify(answers));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});

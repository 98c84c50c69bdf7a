// C-FIND by dcmjs-dimse: a JSON array of {level, elements} on standard input, one of {status, datasets} on standard output.
// Arguments: the module's folder, the port, the called AE title.
'use strict';

const [folder, port, called] = process.argv.slice(2);
const { Client, Dataset, log, requests, constants } = require(folder);
const { CFindRequest } = requests;
const { Status } = constants;

log.setLevel('silent');

function ask(question) {
  return new Promise((resolve, reject) => {
    const client = new Client();
    const request = new CFindRequest();
    const elements = { QueryRetrieveLevel: question.level, ...question.elements };
    request.setDataset(new Dataset({ SpecificCharacterSet: 'ISO_IR 192', ...elements }));
    const datasets = [];
    let status;
    request.on('response', (response) => {
      status = response.getStatus();
      if (response.hasDataset()) {
        datasets.push(response.getDataset().getElements());
      }
    });
    client.addRequest(request);
    client.on('networkError', reject);
    client.on('closed', () => resolve({ status, datasets, pending: Status.Pending }));
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
